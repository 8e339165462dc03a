"""Exported files are read by what reads those formats here, and verdicts on them find their cases again."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.evaluate.command import main
from engine.job.questions import read_questions
from engine.job.rows import parse_row
from engine.job.source import Source
from engine.trajectories.schema import TrajectoryRow, read_rows
from tests.engine.evaluate.helpers import MODELS, evaluate, questions, read, write
from tests.engine.trajectories.helpers import call as trajectories

CONVERSATIONS = [
    {
        "id": f"{number}-{model}",
        "turns": [f"Question {number}?", "And then?"],
        "drafts": [f"{model} e{'e' * number}", f"then {model}"],
        "model": model,
        "category": "writing",
    }
    for number in range(4)
    for model in MODELS
]


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return evaluate(tmp_path, questions(6), "--reward-at-steps", "none")[1]


@pytest.fixture
def turns(tmp_path: Path) -> Path:
    return evaluate(tmp_path, CONVERSATIONS, "--reward-at-steps", "none")[1]


def export(out: Path, form: str) -> Path:
    assert main(["export", str(out), "--format", form]) == 0
    return out / form


def verdicts(out: Path, form: str, path: Path, name: str = "judge") -> list[dict[str, Any]]:
    assert main(["import", str(out), "--format", form, "--input", str(path), "--name", name]) == 0
    return read(out / "judges" / f"{name}.jsonl")


def shown(out: Path, name: str = "judge") -> dict[str, Any]:
    assert main(["report", str(out)]) == 0
    found: dict[str, Any] = json.loads((out / "results.json").read_text())["figures"]["judges"][name]
    return found


def test_alpaca_eval_outputs_are_read_as_such(single: Path) -> None:
    folder = export(single, "alpaca_eval")
    rows = read(single / "given.jsonl")
    assert {path.name for path in folder.iterdir()} == {
        "one.json", "one+refined.json", "two_2b.json", "two_2b+refined.json"
    }  # fmt: skip
    for model, name, column in (("two/2b", "two_2b", "drafts"), ("two/2b", "two_2b+refined", "answers")):
        outputs = json.loads((folder / f"{name}.json").read_text())
        mine = [row for row in rows if row["model"] == model]
        assert [(o["instruction"], o["output"]) for o in outputs] == [(r["prompt"], r[column][0]) for r in mine]
        assert {output["generator"] for output in outputs} == {model + ("+refined" if column == "answers" else "")}
    parsed = [parse_row(raw, i) for i, raw in enumerate(Source.open(str(folder / "one.json")).read())]
    assert [row.turns[0].request.draft for row in parsed] == [r["drafts"][0] for r in rows if r["model"] == "one"]


def test_alpaca_eval_preferences_whichever_output_comes_first(single: Path, tmp_path: Path) -> None:
    rows = read(single / "given.jsonl")
    wanted = [0.0, 1.0, 0.5, 0.25, 0.5, 0.9]
    annotations = [
        {"instruction": row["prompt"], "output_1": row["drafts"][0], "output_2": row["answers"][0], "preference": p}
        for row, p in zip(rows, [1, 2, 1.5, 1.25, 0], strict=False)
    ]
    last = rows[5]
    outputs = {"output_1": last["answers"][0], "output_2": last["drafts"][0]}
    annotations.append({"instruction": last["prompt"], **outputs, "preference": 1.1})
    annotations += [{**annotations[0], "instruction": "another"}, {**annotations[0], "preference": None}]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(annotations))
    assert main(["import", str(single), "--format", "alpaca_eval", "--input", str(path)]) == 3  # one says nothing
    found = read(single / "judges" / "annotations.jsonl")
    assert [verdict["index"] for verdict in found] == list(range(6))
    assert [verdict["preference"] for verdict in found] == pytest.approx(wanted)
    assert shown(single, "annotations")["win_rate"]["mean"] == pytest.approx(sum(wanted) / 6)  # two of each prompt
    assert "Judge: annotations (alpaca_eval)" in (single / "report.html").read_text()


def test_fastchat_answers_are_read_with_their_questions(turns: Path) -> None:
    folder = export(turns, "fastchat")
    asked, _ = read_questions(str(folder / "question.jsonl"))
    assert asked == {number + 1: [f"Question {number}?", "And then?"] for number in range(4)}
    rows = read(turns / "given.jsonl")
    for name, model, column in (("one", "one", "drafts"), ("two_2b+refined", "two/2b", "answers")):
        source = Source.open(str(folder / "model_answer" / f"{name}.jsonl"))
        parsed = [parse_row(raw, i, asked) for i, raw in enumerate(source.read())]
        assert all(row.error is None for row in parsed)
        drafts = [[turn.request.draft for turn in row.turns] for row in parsed]
        assert drafts == [row[column] for row in rows if row["model"] == model]


def test_own_question_ids_are_kept(tmp_path: Path) -> None:
    rows = [{**row, "id": 81 + i // 2} for i, row in enumerate(CONVERSATIONS)]
    _, out = evaluate(tmp_path, rows, "--reward-at-steps", "none")
    folder = export(out, "fastchat")
    assert [row["question_id"] for row in read(folder / "question.jsonl")] == [81, 82, 83, 84]


def test_single_scores_of_mt_bench(turns: Path, tmp_path: Path) -> None:
    export(turns, "fastchat")
    lines = [
        {
            "question_id": q,
            "model": "one" + side,
            "turn": turn,
            "score": 5 + q + (turn if side else 0),
            "judge": ["gpt-4"],
        }
        for q in (1, 2, 3, 4)
        for side in ("", "+refined")
        for turn in (1, 2)
    ]
    lines[0]["score"] = -1  # the judge failed
    lines.append({"question_id": 1, "model": "vicuna", "turn": 1, "score": 3})
    path = write(tmp_path / "gpt-4_single.jsonl", lines)
    assert main(["import", str(turns), "--format", "fastchat", "--input", str(path)]) == 3
    figures = shown(turns, "gpt-4_single")
    assert figures["verdicts"] == 7
    for turn, count in (("1", 3), ("2", 4)):
        scores = figures["turns"][turn]
        assert scores["difference"]["mean"] == pytest.approx(int(turn))
        assert scores["base"]["cases"] == count
    assert figures["scores"]["base"]["mean"] == pytest.approx(sum(5 + q for q in (1, 2, 3, 4)) / 4)
    assert figures["win_rate"]["mean"] == 1.0


def test_pairs_of_mt_bench_count_as_fastchat_counts_them(turns: Path, tmp_path: Path) -> None:
    export(turns, "fastchat")
    names = {"model_1": "two/2b", "model_2": "two/2b+refined"}
    winners = [("model_2", "model_2"), ("model_1", "model_1"), ("model_1", "model_2"), ("tie", "tie"), ("error", "tie")]
    lines = [
        {"question_id": q % 4 + 1, **names, "g1_winner": a, "g2_winner": b, "turn": q // 4 + 1}
        for q, (a, b) in enumerate(winners)
    ]
    lines.append({**lines[0], "model_1": "two/2b+refined", "model_2": "two/2b", "turn": 2, "question_id": 3})
    path = write(tmp_path / "pair.jsonl", lines)
    assert main(["import", str(turns), "--format", "fastchat", "--input", str(path), "--name", "judge"]) == 3
    found = read(turns / "judges" / "judge.jsonl")
    assert [(v["turn"], v["preference"]) for v in found] == [(1, 1.0), (1, 0.0), (1, 0.5), (1, 0.5), (2, 0.0)]


def test_hh_rlhf_pairs_become_trajectories(turns: Path, tmp_path: Path) -> None:
    folder = export(turns, "hh_rlhf")
    pairs, rows = read(folder / "pairs.jsonl"), read(turns / "given.jsonl")
    assert len(read(folder / "base.jsonl")) == len(read(folder / "refined.jsonl")) == len(rows)
    assert pairs
    built = tmp_path / "built.jsonl"
    assert trajectories("build", "--prompts", folder / "pairs.jsonl", "--output", built) == 0
    made = {row.prompt: row for row in read_rows(str(built)) if isinstance(row, TrajectoryRow)}
    for row in rows:
        base, refined = row["base_rewards"][0], row["rewards"][0]
        rewards = {response.text: response.reward for response in made[row["turns"][0]].responses}
        if base != refined:
            assert rewards[row["drafts"][0]] == pytest.approx(base)
            assert rewards[row["answers"][0].strip()] == pytest.approx(refined)


def test_hh_rlhf_choices_find_their_cases(turns: Path, tmp_path: Path) -> None:
    pairs = read(export(turns, "hh_rlhf") / "pairs.jsonl")
    found = verdicts(turns, "hh_rlhf", turns / "hh_rlhf" / "pairs.jsonl")
    assert [(v["index"], v["preference"]) for v in found] == [
        (pair["index"], float(pair["chosen_side"] == "refined")) for pair in pairs
    ]
    turned = [{"chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    other = verdicts(turns, "hh_rlhf", write(tmp_path / "turned.jsonl", turned), "turned")
    assert [1 - v["preference"] for v in other] == [v["preference"] for v in found]


def test_conversations_are_no_alpaca_eval_outputs(turns: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(turns, "alpaca_eval")
    assert "one: 4 conversations of several turns left out" in capsys.readouterr().err


def test_verdicts_on_other_answers_are_refused(
    single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([{"instruction": "a", "output_1": "b", "output_2": "c", "preference": 1}]))
    assert main(["import", str(single), "--format", "alpaca_eval", "--input", str(path)]) == 2
    assert "none of its 1 verdicts" in capsys.readouterr().err
    assert main(["export", str(single), "--format", "alpaca_eval", "--variant", "alone"]) == 2
    assert "no variant 'alone': it has given" in capsys.readouterr().err


def test_a_base_model_may_have_been_refined_before(tmp_path: Path) -> None:
    rows = [{**row, "model": "one+refined"} for row in CONVERSATIONS if row["model"] == "one"]
    _, out = evaluate(tmp_path, rows, "--reward-at-steps", "none")
    folder = export(out, "fastchat")
    names = ["one+refined", "one+refined+refined"]
    assert {path.stem for path in (folder / "model_answer").iterdir()} == set(names)
    single_scores = [
        {"question_id": 1, "model": name, "turn": 1, "score": score} for name, score in zip(names, (3, 8), strict=True)
    ]
    (verdict,) = verdicts(out, "fastchat", write(tmp_path / "single.jsonl", single_scores))
    assert (verdict["base_score"], verdict["score"], verdict["preference"]) == (3.0, 8.0, 1.0)
    winners = [("model_1", 0.0), ("model_2", 1.0)]
    pairs = [
        {"question_id": q, "model_1": names[0], "model_2": names[1], "g1_winner": w, "g2_winner": w, "turn": 1}
        for q, (w, _) in enumerate(winners, 1)
    ]
    found = verdicts(out, "fastchat", write(tmp_path / "pair.jsonl", pairs))
    assert [verdict["preference"] for verdict in found] == [preference for _, preference in winners]


def test_the_generator_tells_whose_an_equal_text_is(tmp_path: Path) -> None:
    row = {"prompt": "Question?", "draft": "same", "model": "one+refined"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.engine.job.stub.answer", lambda value: "same")
        _, out = evaluate(tmp_path, [row], "--reward-at-steps", "none")
    names = {"generator_1": "one+refined", "generator_2": "one+refined+refined"}
    annotation = {"instruction": "Question?", "output_1": "same", "output_2": "same", **names, "preference": 2}
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([annotation]))
    (verdict,) = verdicts(out, "alpaca_eval", path)
    assert verdict["preference"] == 1.0


@pytest.mark.parametrize("models", [("one", "one+refined"), ("two/2b", "two_2b")])
def test_names_that_collide_are_refused(
    tmp_path: Path, models: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = evaluate(tmp_path, questions(2, models), "--reward-at-steps", "none")
    for form in ("alpaca_eval", "fastchat"):
        assert main(["export", str(out), "--format", form]) == 2
        assert "would share the name or file" in capsys.readouterr().err
    assert main(["export", str(out), "--format", "hh_rlhf"]) == 0


def test_verdicts_know_their_variant(tmp_path: Path) -> None:
    rows = questions(6, ("one",))
    _, out = evaluate(tmp_path, rows, "--controls", "alone", command="controls")
    for variant in ("given", "alone"):
        assert main(["export", str(out), "--format", "alpaca_eval", "--variant", variant]) == 0
    assert {path.name for path in (out / "alpaca_eval").iterdir()} == {"one.json", "one+refined.json"}
    folder = out / "alpaca_eval+alone"
    assert {path.name for path in folder.iterdir()} == {"one.json", "one+refined+alone.json"}
    base, alone = (json.loads((folder / f"{name}.json").read_text()) for name in ("one", "one+refined+alone"))
    assert {row["generator"] for row in alone} == {"one+refined+alone"}
    path = tmp_path / "annotations.json"
    path.write_text(
        json.dumps(
            [
                {"instruction": a["instruction"], "output_1": a["output"], "output_2": b["output"], "preference": 2}
                for a, b in zip(base, alone, strict=True)
            ]
        )
    )
    imported = ["import", str(out), "--format", "alpaca_eval", "--input", str(path), "--variant", "alone"]
    assert main(imported) == 0
    assert {row["variant"] for row in read(out / "judges" / "annotations+alone.jsonl")} == {"alone"}
    assert shown(out, "annotations+alone")["variant"] == "alone"
    assert "| variant judged | alone |" in (out / "report.md").read_text()


def test_odd_verdicts_are_reported_rows(turns: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(turns, "fastchat")
    pair = {"question_id": 1.0, "model_1": "one", "model_2": "one+refined", "turn": 1.0}
    lines = [
        {**pair, "g1_winner": "model_2", "g2_winner": "model_2"},
        {**pair, "g1_winner": ["model_2"], "g2_winner": {"a": 1}},
        {**pair, "question_id": [1], "g1_winner": "model_2", "g2_winner": "model_2"},
        {**pair, "turn": 1.5, "g1_winner": "model_2", "g2_winner": "model_2"},
        {**pair, "model_1": ["one"], "g1_winner": "model_2", "g2_winner": "model_2"},
        {"question_id": {"a": 1}, "model": "one", "turn": 1, "score": 3},
        {"question_id": 1, "model": "one", "turn": 1.0, "score": 3},
        {"question_id": 1, "model": "one+refined", "turn": 1, "score": 4},
    ]
    path = write(tmp_path / "odd.jsonl", lines)
    assert main(["import", str(turns), "--format", "fastchat", "--input", str(path)]) == 3
    assert [(v["turn"], v["preference"]) for v in read(turns / "judges" / "odd.jsonl")] == [(1, 1.0), (1, 1.0)]
    assert "2 verdicts, 1 that say nothing, 4 about other answers" in capsys.readouterr().err
