"""The scripts behind the shipped refiner: what is held out, what a control is, what a table says."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.measure import RESULTS
from bench.reproduction import measure as measuring
from bench.reproduction.cases import CONTROLS, Case, controlled, ranked_cases, spread
from bench.reproduction.data import CORRECTIONS, HELD_OUT, VALIDATION, prepare
from bench.reproduction.examples import FILLERS, damage
from bench.reproduction.measure import Judge, agreement, dump, losses
from bench.reproduction.plot import smooth
from bench.reproduction.repair import columns, damaged
from bench.reproduction.table import accepted, by_prompt, correctors, interval, less, report
from engine import Refiner
from engine.refiner import DEFAULT_CHECKPOINT
from engine.trajectories.dataset import load
from tests.engine.checkpoints import Oracle
from tests.engine.training.references import plain_loss

WORDS = "a small refiner reads the draft of an answer and writes it again with fewer mistakes than there were".split()
MODELS = ("one", "two", "three")
PROMPTS = 12 + VALIDATION + HELD_OUT


def response_rows(count: int) -> list[dict[str, Any]]:
    """Rows as the public files have them, every text of its own words."""
    rng = random.Random(0)
    rows = []
    for number in range(count):
        texts = [" ".join(rng.choices(WORDS, k=20)) + f" {model} {number}." for model in MODELS]
        responses = [{"model": m, "text": t, "reward": rng.random()} for m, t in zip(MODELS, texts, strict=True)]
        rows.append({"prompt_id": f"p{number}", "prompt": f"Question {number}?", "responses": responses})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproduction")
    rows = response_rows(PROMPTS)
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(folder / "responses.jsonl", DEFAULT_CHECKPOINT, folder / "out", seed=0)
    return folder / "out"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_held_out_prompts_are_not_trained_on(data: Path) -> None:
    train = (data / "train.jsonl").read_text()
    held_out = range(PROMPTS - HELD_OUT, PROMPTS)
    assert len(rows_of(data / "train.jsonl")) == 2 * (PROMPTS - HELD_OUT)
    for number in held_out:
        assert f"Question {number}?" not in train
    for name in ("plain", "repair"):
        assert [row["prompt"].split("?")[0] for row in rows_of(data / f"{name}.jsonl")] == [
            f"Question {number}" for number in held_out
        ]


def test_a_repair_leads_from_the_draft_in_its_prompt_to_a_real_response(data: Path) -> None:
    texts = {r["text"] for row in rows_of(data / "trajectories.jsonl") for r in row["responses"]}
    repairs = [row for row in rows_of(data / "train.jsonl") if row.get("source") == "repair"]
    changed = 0
    for row in repairs:
        draft, clean = sorted(row["responses"], key=lambda r: r["reward"])
        assert row["prompt"].endswith(f"Draft answer:\n{draft['text']}")
        assert clean["text"] in texts
        changed += draft["text"] != clean["text"]
    assert changed


def test_corrections_leave_out_the_prompts_that_are_chosen_on(data: Path) -> None:
    rows = rows_of(data / "corrections.jsonl")
    asked = {row["prompt"].split("?")[0] for row in rows}
    assert asked == {f"Question {number}" for number in range(PROMPTS - VALIDATION - HELD_OUT)}
    assert len(rows) == len(asked) * CORRECTIONS


def test_what_ships_is_chosen_on_prompts_that_do_not_judge_it(data: Path) -> None:
    core = AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT).backend_tokenizer
    chosen_on, judged = (damaged(data.parent / "responses.jsonl", core, [7, 8], validation=v) for v in (True, False))
    first = PROMPTS - HELD_OUT - VALIDATION
    assert [row["prompt"] for row in chosen_on] == 2 * [f"Question {first + i}?" for i in range(VALIDATION)]
    assert [row["prompt"] for row in judged] == 2 * [f"Question {first + VALIDATION + i}?" for i in range(HELD_OUT)]
    assert [row["number"] for row in judged] == 2 * list(range(HELD_OUT))
    assert [row["draft"] for row in judged[:HELD_OUT]] != [row["draft"] for row in judged[HELD_OUT:]]
    best = {row["prompt"]: row["responses"] for row in rows_of(data / "trajectories.jsonl")}
    for row in judged:
        assert row["clean"] == max(best[row["prompt"]], key=lambda r: r["reward"])["text"]


def test_drafts_of_corrections_keep_every_token_in_its_place(data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT)
    changed = 0
    for row in rows_of(data / "corrections.jsonl"):
        texts = [r["text"] for r in sorted(row["responses"], key=lambda r: r["reward"])]
        lengths = [[len(tokenizer(f" {word}").input_ids) for word in text.split()] for text in texts]
        assert lengths[0] == lengths[1]
        assert len({len(tokenizer(text).input_ids) for text in texts}) == 1
        changed += texts[0] != texts[1]
    assert changed


def test_damage_repeats_with_its_seed_and_touches_few_words() -> None:
    text = " ".join(WORDS * 10)
    known = {*WORDS, *(word for filler in FILLERS for word in filler.split())}
    first, second = (damage(text, random.Random(3), WORDS) for _ in range(2))
    assert first == second != text
    assert sum(word in known for word in first.split()) > 0.85 * len(first.split())


def test_cases_are_all_responses_but_the_best_as_the_trainer_ranks_them(data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT)
    cases = ranked_cases(data / "plain.jsonl", tokenizer)
    trajectories = list(load(str(data / "plain.jsonl"), tokenizer))
    assert len(cases) == HELD_OUT * (len(MODELS) - 1)
    for case in cases:
        trajectory = trajectories[case.prompt]
        assert trajectory.rewards is not None
        best = max(range(len(MODELS)), key=lambda i: trajectory.rewards[i])
        assert case.target == trajectory.responses[best] != case.guess
        assert case.model != MODELS[best]
        assert case.guess == trajectory.responses[MODELS.index(case.model)]


def some_cases(prompts: int = 10) -> list[Case]:
    return [
        Case(p, m, [4, 5 + p], [10 * p + i, 7, 2], [10 * p, 7, 8, 2])
        for p in range(prompts)
        for i, m in enumerate("ab")
    ]


def test_controls_replace_the_guess_and_nothing_else() -> None:
    cases = some_cases()
    assert controlled(cases, "given", 100, 8) == cases
    for control in CONTROLS[1:]:
        made = controlled(cases, control, 100, 8)
        assert [(c.prompt, c.prompt_ids, c.target) for c in made] == [(c.prompt, c.prompt_ids, c.target) for c in cases]
    for case, made in zip(cases, controlled(cases, "shuffled", 100, 8), strict=True):
        (source,) = [other for other in cases if other.guess == made.guess]
        assert source.prompt != case.prompt
        assert source.model == case.model
    assert {len(c.guess) for c in controlled(cases, "none", 100, 8)} == {0}
    assert {len(c.guess) for c in controlled(cases, "random", 100, 8)} == {8}


def test_a_spread_gives_every_base_model_the_same_number_of_prompts() -> None:
    chosen = spread(some_cases(), 1)
    assert [case.prompt for case in chosen] == list(range(10))
    assert sorted(case.model for case in chosen) == ["a"] * 5 + ["b"] * 5


@pytest.mark.parametrize("steps", [1, 3])
def test_iterates_are_those_of_whole_forward_passes(
    steps: int, oracle: Callable[[str], Oracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama, tokens = oracle("llama"), 12
    rng = random.Random(1)
    target = [89] * 20
    cases = [
        Case(p, "m", [rng.randrange(4, 101) for _ in range(5)], [rng.randrange(4, 101) for _ in range(20)], target)
        for p in range(3)
    ]
    monkeypatch.setattr(measuring, "STEPS", (steps,))
    with Refiner.from_pretrained(llama.folder) as refiner:
        columns = Judge(refiner, IdsAsWords(), tokens).judge(cases)
    for index, case in enumerate(cases):
        iterates = [case.guess[:tokens]]
        while len(iterates) < 2 or iterates[-1] != iterates[-2]:
            logits = llama.logits(case.prompt_ids + iterates[-1])[len(case.prompt_ids) - 1 : -1]
            iterates.append(logits.argmax(-1).tolist())
        answer, iterate = (until(ids, llama.eos) for ids in (iterates[-1], iterates[min(steps, len(iterates) - 1)]))
        alike = 2 * iterate.count(89) / (len(iterate) + tokens)  # all of the target is this one token
        assert columns["answer_tokens"][index] == len(answer)
        assert columns[f"settled_{steps}"][index] == pytest.approx(agreement(iterate, answer), abs=1e-4)
        assert columns[f"after_{steps}_tokens"][index] == pytest.approx(alike, abs=1e-4)
        assert columns[f"after_{steps}_words"][index] == pytest.approx(alike, abs=1e-4)
    assert len(set(columns[f"settled_{steps}"])) > 1


class IdsAsWords:
    """Stands for a tokenizer."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def until(ids: list[int], ends: frozenset[int]) -> list[int]:
    """Up to and with the first end."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))]


def test_losses_are_those_of_separate_forward_passes(data: Path, tmp_path: Path) -> None:
    lines = (data / "plain.jsonl").read_text().splitlines()[:2]
    (tmp_path / "two.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT)
    columns = losses(DEFAULT_CHECKPOINT, tmp_path / "two.jsonl")
    model = AutoModelForCausalLM.from_pretrained(DEFAULT_CHECKPOINT, dtype=torch.float32).eval()
    for number, trajectory in enumerate(load(str(tmp_path / "two.jsonl"), tokenizer)):
        assert trajectory.rewards is not None
        order = sorted(range(len(MODELS)), key=lambda i: trajectory.rewards[i])
        *drafts, target = (list(trajectory.responses[i]) for i in order)
        pad = tokenizer.pad_token_id
        filled = [(draft + [pad] * len(target))[: len(target)] for draft in drafts]
        expected = plain_loss(model, [(list(trajectory.prompt_ids), target, filled)], omega=1.0)
        # both are rounded to four digits behind the point, and sums in float32 differ by far less
        assert columns["ar"][number] == pytest.approx(expected.ar.item(), abs=2e-4)
        assert columns["consistency"][number] == pytest.approx(expected.consistency.item(), abs=2e-4)


def test_intervals_draw_prompts() -> None:
    rng = np.random.default_rng(1)
    values = dict(enumerate(rng.normal(3.0, 2.0, 400)))
    mean, low, high = interval(values)
    assert mean == pytest.approx(np.mean(list(values.values())))
    standard_error = np.std(list(values.values())) / 20
    # quantiles of 2000 draws: off by a few per cent of the width
    assert (low, high) == pytest.approx(
        (mean - 1.96 * standard_error, mean + 1.96 * standard_error), abs=0.3 * standard_error
    )
    assert interval({0: 5.0, 1: 5.0}) == (5.0, 5.0, 5.0)


def test_figures_are_averaged_within_a_prompt_first() -> None:
    columns = {
        "prompt": [0, 0, 1],
        "model": ["a", "b", "a"],
        "steps": [2, 4, 10],
        "answer_tokens": [6, 6, 20],
        "x": [1, None, 3],
    }
    assert by_prompt(columns, "steps") == {0: 3.0, 1: 10.0}
    assert by_prompt(columns, "steps", "a") == {0: 2.0, 1: 10.0}
    assert by_prompt(columns, "x") == {0: 1.0, 1: 3.0}
    assert by_prompt(columns, "missing") == {}
    assert accepted(columns) == {0: 2.0, 1: 2.0}
    assert less({0: 3.0, 1: 1.0}, {1: 4.0, 2: 9.0}) == {1: -3.0}


def test_the_committed_results_make_all_tables() -> None:
    results = json.loads((RESULTS / "reproduction.json").read_text())
    text = report(results)
    for run in (*results["runs"], *results["correctors"]):
        assert f"| {run} |" in text
    assert "nan" not in text
    assert text == (RESULTS / "reproduction.md").read_text()  # else: python -m bench.reproduction.table
    assert json.loads(dump(results)) == results


def repair_rows(*outputs: str) -> list[dict[str, Any]]:
    texts = [("a b c d", "a b x d"), ("a b c d", "a b x d"), ("a b", "a b")]
    return [
        {"number": n, "draft": draft, "clean": clean, "output": output, "tokens": 12, "steps": n + 1}
        for n, ((draft, clean), output) in enumerate(zip(texts, outputs, strict=True))
    ]


def test_repairs_are_judged_on_the_damaged_drafts_alone() -> None:
    made = columns(repair_rows("a b x d", "a b", "a b"))
    assert made["draft_vs_clean"] == [0.75, 0.75, None]
    assert made["output_vs_clean"] == [1.0, pytest.approx(4 / 6, abs=1e-4), None]
    assert made["better"] == made["repaired"] == [True, False, None]
    assert made["kept"] == [None, None, True]
    assert made["cut_short"] == [False, True, False]
    assert made["output_vs_draft"] == [0.75, pytest.approx(4 / 6, abs=1e-4), 1.0]


def test_correctors_are_compared_with_the_first_on_the_same_drafts() -> None:
    first, second = columns(repair_rows("a b", "a b", "a b")), columns(repair_rows("a b x d", "a b x d", "a"))
    (_, _, _, row) = correctors({"one": {"repair": first}, "two": {"repair": second}}).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[4:] == [
        "1.000 (1.000 to 1.000)", "0.333 (0.333 to 0.333)", "2 of 2", "2 of 2", "1 of 3", "0 of 1",
        "7.3 (4.0 to 12.0)",
    ]  # fmt: skip


def test_curves_are_running_means() -> None:
    assert smooth([1.0, 3.0, 5.0, 7.0], over=2) == [1.0, 2.0, 4.0, 6.0]
