"""The paper's tables: what is compared with what, what a verdict says."""

import json
import random
from collections.abc import Sequence

import pytest

from bench.measure import RESULTS
from bench.reproduction.paper.answers import OWN, REAL
from bench.reproduction.paper.claims import ABSENT, BROKEN, FAILS, HOLDS, OPEN, broken, claims, counted, verdict
from bench.reproduction.paper.compare import Answers, difference, length_controlled, wins
from bench.reproduction.paper.table import READING, cost, figures_hash, page, reading
from bench.reproduction.table import controls


def some(rewards: Sequence[float], lengths: Sequence[int] | None = None) -> Answers:
    lengths = lengths or [100 + place for place in range(len(rewards))]
    return Answers({"prompt": list(range(len(rewards))), "reward": list(rewards), "characters": list(lengths)})


def test_verdicts_come_from_intervals() -> None:
    rng = random.Random(0)
    noise = [rng.gauss(0, 1) for _ in range(40)]
    base, better, like = some([0.0] * 40), some([1 + 0.1 * x for x in noise]), some(noise)
    assert verdict(difference(better, base)) == HOLDS
    assert verdict(difference(base, better)) == FAILS
    assert verdict(difference(like, base)) == OPEN
    assert wins(better, base).mean == 1.0
    assert length_controlled(better, some([0.0] * 40)) is None  # equally long throughout
    shorter = some([0.0] * 40, [100 + place + place % 3 + 1 for place in range(40)])
    assert length_controlled(better, shorter) is None  # none is as long as the other
    shorter.columns["characters"][0] = 0
    assert length_controlled(better, shorter) is not None
    with pytest.raises(ValueError, match="different prompts"):
        difference(base, some([0.0]))


def test_claims_about_every_base_need_every_base() -> None:
    level = {name: 0.1 * place for place, name in enumerate((*REAL, *OWN))}
    sets = {name: some([value] * 5) for name, value in level.items()}
    sets |= {f"{name} + shown": some([value + 0.05] * 5) for name, value in level.items()}
    sets["diffpo"] = some([0.45] * 5)
    assert counted(sets, "{} + shown") == ("higher 9, lower 0, open 0 of 9", HOLDS)
    assert counted(sets, "diffpo") == ("higher 5, lower 4, open 0 of 9", "does not hold: lower behind 4")
    assert counted(sets, "nothing") == ("–", ABSENT)
    verdicts = {row[0]: row[-1] for row in claims(sets)}
    assert verdicts["base + DiffPO (draft shown) above DPO"] == FAILS  # 0.65 against 0.7
    assert verdicts["adds on top of DPO (draft shown)"] == HOLDS
    assert verdicts["a larger refiner is better: layers-24 above layers-18"] == ABSENT


def test_a_high_reward_for_broken_text_is_no_success() -> None:
    def with_nats(reward: float, nats: float) -> Answers:
        return Answers({**some([reward] * 6).columns, "nats": [nats, None, nats + 0.1, nats, None, nats]})

    sets = {name: with_nats(0.0, 1.5 + place / 10) for place, name in enumerate(REAL)}
    sets |= {
        "base": with_nats(0.0, 0.8),
        "base + shown": with_nats(1.0, 2.0),
        "base + diffpo, 4 steps": with_nats(1.0, 5.0),
    }
    assert not broken(sets, "base + shown")
    assert broken(sets, "base + diffpo, 4 steps")
    verdicts = {row[0]: row[-1] for row in claims(sets)}
    assert verdicts["base + DiffPO (draft shown) above base"] == HOLDS
    assert verdicts["base + DiffPO (4 steps) above base"] == BROKEN
    assert verdicts["one refiner improves every base (4 steps)"] == BROKEN


def test_the_committed_results_make_the_committed_tables() -> None:
    results = json.loads((RESULTS / "paper_tables.json").read_text())
    text = page(results, RESULTS / "paper_tables.json")
    assert "nan" not in text
    assert "### Reading them" in text  # else: write reading.md anew, its first line with figures_hash
    assert text == (RESULTS / "paper_tables.md").read_text()  # else: python -m bench.reproduction.paper.table


def test_a_reading_stands_beside_the_figures_that_it_is_about_alone() -> None:
    results = json.loads((RESULTS / "paper_tables.json").read_text())
    assert reading(results)
    assert figures_hash(results) == figures_hash(results | {"seconds": {}, "machine": {}})
    results["answers"]["base"]["reward"][0] += 1
    assert reading(results) == ""
    assert READING.read_text(encoding="utf-8").startswith("<!-- of ")


def test_a_draft_costs_what_its_base_took() -> None:
    def made(steps: float, fed: float) -> Answers:
        columns = {"prompt": [0, 1], "tokens": [9, 9], "steps": [steps] * 2, "forward_tokens": [fed] * 2}
        return Answers(columns | {"finish_reason": ["eos", "length"]})

    sets = {"base": made(60, 100), "diffpo": made(50, 90), "base + diffpo, 4 steps": made(4, 300)}
    rows = {line.split(" | ")[0].strip("| "): line for line in cost(sets).splitlines()}
    assert "| 60.0 | 100.0 | 1 of 2 |" in rows["base"]
    assert "| 50.0 | 90.0 |" in rows["+ DiffPO, converged: the refiner alone"]
    assert "| 64.0 (60.0 of them the draft's) | 400.0 (100.0 of them the draft's) |" in rows["+ DiffPO, 4 steps"]


def test_controls_of_all_runs_are_over_the_same_prompts() -> None:
    def given(prompts: Sequence[int], pace: float) -> dict[str, list[float]]:
        names = [*(f"after_{steps}_tokens" for steps in (1, 2, 4, 8)), "converged_tokens"]
        columns = {"prompt": list(prompts), "answer_tokens": [pace * p for p in prompts], "steps": [1.0] * len(prompts)}
        return columns | {name: [float(p) for p in prompts] for name in names}

    results = {
        "ar": {"sets": {"plain": {"given": given((1, 2), 1.0), "random": given((1, 2), 1.0)}}},
        "lm": {"sets": {"plain": {"given": given((1, 2, 9), 1.0)}}},
    }
    lines = controls(results, "plain").splitlines()
    assert [line.split(" | ")[-1].strip(" |") for line in lines[2:]] == ["1.500"] * 3
