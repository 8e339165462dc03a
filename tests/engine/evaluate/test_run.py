"""The commands on a stub: what is compared, what is counted, what a crash and a bad row cost."""

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.evaluate.cases import read_cases
from engine.job.source import Source
from engine.request import Request
from tests.engine.evaluate import scorers
from tests.engine.evaluate.helpers import MODELS, evaluate, questions, read, write
from tests.engine.job.stub import answer, finish, start

FEW = ("--reward-at-steps", "none")


def stub_answer(row: dict[str, Any]) -> str:
    return answer(Request(prompt=row["prompt"], draft=row["draft"]))


def figures(out: Path) -> dict[str, Any]:
    from engine.evaluate.command import main

    assert main(["report", str(out)]) == 0
    found: dict[str, Any] = json.loads((out / "results.json").read_text())["figures"]
    return found


def test_rows_and_figures_are_those_computed_by_hand(tmp_path: Path) -> None:
    rows = questions(9)
    status, out = evaluate(tmp_path, rows, *FEW)
    assert status == 0
    made = read(out / "given.jsonl")
    by_prompt: dict[str, list[tuple[float, float]]] = {}
    for row, case in zip(rows, made, strict=True):
        text = stub_answer(row)
        (base,), (refined,) = (scorers.letters(row["prompt"], [t]) for t in (row["draft"], text))
        assert (case["drafts"], case["answers"]) == ([row["draft"]], [text])
        assert (case["base_reward"], case["reward"]) == (base, refined)
        assert case["model"] == row["model"]
        assert case["category"] == row["category"]
        assert case["error"] is None
        assert base is not None
        assert refined is not None
        by_prompt.setdefault(row["prompt"], []).append((refined - base, (refined > base) + 0.5 * (refined == base)))
    main = figures(out)["variants"]["given"]
    means = [[sum(column) / len(cases) for column in zip(*cases, strict=True)] for cases in by_prompt.values()]
    assert (main["cases"], main["compared"], main["prompts"]) == (18, 18, 9)
    for name, place in (("difference", 0), ("win_rate", 1)):
        assert main[name]["mean"] == pytest.approx(sum(mean[place] for mean in means) / 9)
        assert main[name]["prompts"] == 9
    parts = figures(out)["models"]
    assert set(parts) == set(MODELS)


def test_a_bad_row_costs_itself_and_is_counted(tmp_path: Path) -> None:
    rows: list[Any] = questions(4, ("one",))
    rows[1] = {"prompt": "no draft"}
    rows[2] = {"prompt": "Question unanswerable?", "draft": "a draft"}
    rows.append({"prompt": "Question 9?", "draft": "worthless"})
    status, out = evaluate(tmp_path, rows, *FEW)
    assert status == 3
    made = read(out / "given.jsonl")
    assert [case["error"] and case["error"]["type"] for case in made] == [
        None, "InvalidRequest", "InvalidRequest", None, "NoReward"
    ]  # fmt: skip
    main = figures(out)["variants"]["given"]
    assert (main["cases"], main["compared"]) == (5, 2)
    assert main["errors"] == {"InvalidRequest": 2, "NoReward": 1}
    assert "3 of 5 cases have no comparison" in (out / "report.md").read_text()


def test_a_scorer_that_fails_on_one_prompt_costs_that_case(tmp_path: Path) -> None:
    rows = [*questions(3, ("one",)), {"prompt": "unscorable?", "draft": "x"}, *questions(2, ("other",))]
    status, out = evaluate(tmp_path, rows, *FEW, scorer="failing")
    assert status == 3
    kinds = [case["error"] and case["error"]["type"] for case in read(out / "given.jsonl")]
    assert kinds == [None, None, None, "ScoringFailed", None, None]


def test_identical_answers_tie_whatever_the_scorer_says(tmp_path: Path) -> None:
    rows = questions(3, ("one",))
    rows += [{**row, "draft": stub_answer({**row, "draft": "d"})} for row in rows]
    for row in rows[3:]:
        row["draft"] = "fixed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tests.engine.job.stub.answer", lambda value: value.draft if value.draft == "fixed" else "another"
        )
        _, out = evaluate(tmp_path, rows, *FEW, scorer="changing")
    made = read(out / "given.jsonl")
    assert [case["preference"] for case in made[3:]] == [0.5] * 3
    assert all(case["identical"] and case["reward"] == case["base_reward"] for case in made[3:])
    assert all(case["preference"] == 1.0 for case in made[:3])  # the later call gives more


def test_every_side_of_a_conversation_is_scored_behind_its_own_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"
    monkeypatch.setenv(scorers.ASKED, str(asked))
    row = {"turns": ["First?", "Second?"], "drafts": ["Draft one", "Draft two"], "id": 7}
    _, out = evaluate(tmp_path, [row], *FEW)
    first = answer(Request(prompt="First?", draft="Draft one"))
    lines = asked.read_text()
    assert repr(("Human: First?\n\nAssistant: Draft one\n\nHuman: Second?", "Draft two")) in lines
    assert f"First?\\n\\nAssistant: {first}\\n\\nHuman: Second?" in lines
    (case,) = read(out / "given.jsonl")
    assert len(case["rewards"]) == len(case["base_rewards"]) == 2
    assert case["reward"] == pytest.approx(sum(case["rewards"]) / 2)


def test_every_response_of_a_trajectory_is_a_draft(tmp_path: Path) -> None:
    responses = [{"model": name, "text": f"{name} says e{'e' * i}", "reward": float(i)} for i, name in enumerate("abc")]
    rows = [{"prompt_id": f"p{n}", "prompt": f"Question {n}?", "responses": responses} for n in range(3)]
    _, out = evaluate(tmp_path, [*rows, {"prompt": "None?", "responses": []}], *FEW)
    made = read(out / "given.jsonl")
    assert [(case["id"], case["model"], case["given_reward"]) for case in made[:4]] == [
        ("p0", "a", 0.0), ("p0", "b", 1.0), ("p0", "c", 2.0), ("p1", "a", 0.0)
    ]  # fmt: skip
    assert all(case["best"] == "c says eee" and case["best_given_reward"] == 2.0 for case in made[:9])
    assert made[2]["draft_overlap_best"] == 1.0
    assert made[9]["error"]["type"] == "InvalidRequest"
    check = figures(out)["scorer_check"]
    assert check["pairs"] == 9
    assert check["agreement"]["mean"] == 1.0  # the letter e goes with these rewards
    few = tmp_path / "few"
    few.mkdir()
    _, out = evaluate(few, rows, *FEW, "--drafts-per-prompt", "1")
    assert [case["model"] for case in read(out / "given.jsonl")] == ["a", "b", "c"]


def test_drafts_have_the_limit_of_the_answers(tmp_path: Path) -> None:
    def cut(text: str) -> tuple[str, bool]:
        return " ".join(text.split()[:3]), len(text.split()) > 3

    path = write(
        tmp_path / "in.jsonl", [{"prompt": "Q?", "draft": "one two three four"}, {"prompt": "Q?", "draft": "one"}]
    )
    cases = read_cases(Source.open(str(path)), None, cut)
    assert [(case.drafts, case.cut) for case in cases] == [(["one two three"], [True]), (["one"], [False])]


def test_only_the_last_turns_may_be_without_a_draft(tmp_path: Path) -> None:
    asked = ["First?", "Second?", "Third?"]
    rows = [
        {"id": 0, "turns": asked, "drafts": [None, "to the second"]},
        {"id": 1, "turns": asked, "drafts": ["to the first", None, "to the third"]},
        {"id": 2, "turns": asked, "drafts": ["to the first", "to the second", None]},
        {"question_id": 5, "choices": [{"turns": [None, "to the second"]}]},
    ]
    write(tmp_path / "questions.jsonl", [{"question_id": 5, "turns": asked}])
    status, out = evaluate(tmp_path, rows, *FEW, "--questions", tmp_path / "questions.jsonl")
    assert status == 3
    made = read(out / "given.jsonl")
    assert [row["id"] for row in made] == [0, 1, 2, 5]
    for row, turn in ((made[0], 1), (made[1], 2), (made[3], 1)):
        assert row["error"]["type"] == "InvalidRequest"
        assert row["error"]["message"].startswith(f"turn {turn} of ")
    assert made[2]["error"] is None
    assert made[2]["turns"] == asked[:2]


def test_a_response_that_was_cut_before_stays_cut(tmp_path: Path) -> None:
    responses = [
        {"model": "a", "text": "complete", "reward": 1.0},
        {"model": "b", "text": "broken o", "reward": 2.0, "truncated": True},
    ]
    rows = [{"prompt": "Q?", "responses": responses}, {"prompt": "Q?", "draft": "mine", "responses": responses}]
    path = write(tmp_path / "in.jsonl", rows)
    cases = read_cases(Source.open(str(path)), None, lambda text: (text, False))
    assert [(case.cut, case.best_cut) for case in cases] == [([False], True), ([True], True), ([False], True)]


def test_half_a_surrogate_pair_costs_its_row(tmp_path: Path) -> None:
    good = {"id": "fine", "prompt": "Question?", "draft": "x", "model": "one", "category": "easy"}
    rows = [good, *({**good, name: "\ud800"} for name in ("id", "model", "category"))]
    status, out = evaluate(tmp_path, rows, *FEW)
    assert status == 3
    made = read(out / "given.jsonl")
    assert [(row["id"], row["error"] and row["error"]["type"]) for row in made] == [
        ("fine", None), (1, "InvalidTrajectory"), ("fine", "InvalidTrajectory"), ("fine", "InvalidTrajectory")
    ]  # fmt: skip
    assert figures(out)["variants"]["given"]["compared"] == 1


def test_errors_of_a_control_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = questions(3, ("one",))
    status, out = evaluate(tmp_path, rows, *FEW, "--controls", "alone", command="controls", scorer="drafted")
    assert status == 3
    assert figures(out)["variants"]["given"]["compared"] == 3
    assert "alone: 3 of 3 cases have no comparison" in capsys.readouterr().err
    text = (out / "report.md").read_text()
    assert "alone: 3 of 3 cases have no comparison" in text
    assert "| alone | 0 | NoReward |" in text


def test_empty_answers_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*questions(4, ("one",)), {"prompt": "Question?", "draft": "worthless"}, {"prompt": "Mute?", "draft": "x"}]
    monkeypatch.setattr("tests.engine.job.stub.answer", lambda value: "" if value.prompt == "Mute?" else "answer")
    status, out = evaluate(tmp_path, rows, *FEW)
    assert status == 3
    assert figures(out)["variants"]["given"]["unscored"] == {
        "base": {"cases": 1, "empty": 0}, "refined": {"cases": 1, "empty": 1}
    }  # fmt: skip
    assert "1 refined answers (1 empty) and 1 drafts (0 empty)" in (out / "report.md").read_text()


def finished(out: Path) -> dict[str, bytes]:
    """The rows of every variant, without their timings."""
    return {
        path.name: re.sub(rb'"seconds": [0-9.e-]+', b'"seconds": 0', path.read_bytes()) for path in out.glob("*.jsonl")
    }


@pytest.mark.parametrize("after", [1, 9, 40])
def test_a_killed_run_goes_on(tmp_path: Path, after: int) -> None:
    rows = questions(12, ("one", "two", "three"))
    (tmp_path / "calm").mkdir()
    (tmp_path / "killed").mkdir()
    options = ("--controls", "alone,shuffled", "--no-report")
    _, calm = evaluate(tmp_path / "calm", rows, *options, command="controls")

    def run(limit: int | None, asked: Path) -> int:
        os.environ[scorers.ASKED] = str(asked)
        if limit:
            os.environ[scorers.KILL_AFTER] = str(limit)
        return evaluate(tmp_path / "killed", rows, *options, command="controls")[0]

    log = tmp_path / "log"
    assert finish(start(lambda: run(after, tmp_path / "first"), log)) == -signal.SIGKILL
    assert finish(start(lambda: run(None, tmp_path / "second"), log)) == 0, log.read_text()
    assert finished(tmp_path / "killed" / "out") == finished(calm)
    asked = [(tmp_path / name).read_text().splitlines() for name in ("first", "second")]
    again = set(asked[0]) & set(asked[1])
    assert len(again) <= 32  # what was under way: one group
    assert len(asked[1]) < len(asked[0]) + len(asked[1])


def test_another_scorer_or_input_is_refused_and_overwrite_starts_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = questions(3)
    assert evaluate(tmp_path, rows, *FEW)[0] == 0
    assert evaluate(tmp_path, rows, *FEW, scorer="failing")[0] == 2
    assert "another evaluation (scorer callable" in capsys.readouterr().err
    assert evaluate(tmp_path, rows[1:], *FEW)[0] == 2
    assert "another content of the input" in capsys.readouterr().err
    assert evaluate(tmp_path, rows, *FEW, "--keep-prefix", "2")[0] == 2
    assert "given with other options" in capsys.readouterr().err
    assert evaluate(tmp_path, rows[1:], *FEW, "--overwrite")[0] == 0
    assert len(read(tmp_path / "out" / "given.jsonl")) == len(rows) - 1


def test_controls_go_on_from_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = questions(4)
    _, out = evaluate(tmp_path, rows, *FEW)
    before = (out / "given.jsonl").read_bytes()
    monkeypatch.setenv(scorers.ASKED, str(tmp_path / "asked"))
    _, out = evaluate(tmp_path, rows, "--controls", "alone", command="controls")
    assert (out / "given.jsonl").read_bytes() == before
    assert set(json.loads((out / "results.json").read_text())["variants"]) == {"given", "alone"}
    drafts = {row["draft"] for row in rows}
    assert not any(draft in (tmp_path / "asked").read_text() for draft in drafts)  # they have their rewards


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["rewards", "--input", "nowhere.jsonl"], "nowhere.jsonl"),
        (["rewards", "--callable", "no.such:thing"], "module:function"),
        (["report", "nowhere"], "no results.json"),
        (["export", "nowhere", "--format", "fastchat"], "no results.json"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from engine.evaluate.command import main

    if options[0] == "rewards":
        write(tmp_path / "in.jsonl", questions(1))
        rest = {"--input": str(tmp_path / "in.jsonl"), "--callable": "math:sqrt", "--output": str(tmp_path / "out")}
        rest |= dict(zip(options[1::2], options[2::2], strict=True))
        options = [options[0], *(part for item in rest.items() for part in item)]
        options += ["--max-new-tokens", "4", "--reward-at-steps", "none"]
    assert main(options) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1]
    assert sys.exc_info() == (None, None, None)


def test_latency_counts_the_drafts_time_where_a_draft_is_waited_for(tmp_path: Path) -> None:
    rows = [{**row, "draft_seconds": 2.0} for row in questions(3, ("one",))]
    _, out = evaluate(tmp_path, rows, "--controls", "alone", command="controls")
    variants = figures(out)["variants"]
    for name, extra in (("given", 2.0), ("alone", 0.0)):
        one = variants[name]
        assert one["seconds_with_draft"]["mean"] == pytest.approx(one["seconds"]["mean"] + extra)


def test_errors_are_tried_again_without_doing_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = questions(5, ("one",))
    rows[2]["prompt"] = "A large question?"
    status, out = evaluate(tmp_path, rows, *FEW, "--kv-cache-tokens", "500", "--max-new-tokens", "64")
    assert status == 3
    assert read(out / "given.jsonl")[2]["error"]["type"] == "RequestTooLong"
    monkeypatch.setenv(scorers.ASKED, str(tmp_path / "asked"))
    status, out = evaluate(
        tmp_path, rows, *FEW, "--kv-cache-tokens", "5000", "--max-new-tokens", "64", "--retry-errors"
    )
    assert status == 0
    made = read(out / "given.jsonl")
    assert all(row["error"] is None for row in made)
    assert len((tmp_path / "asked").read_text().splitlines()) == 1  # the answer that was not there before
    assert made[2]["reward"] == scorers.letters(rows[2]["prompt"], [stub_answer(rows[2])])[0]
