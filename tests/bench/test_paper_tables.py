"""The paper's tables: what is compared with what, what a verdict says."""

import json
import random
from collections.abc import Sequence

import pytest

from bench.measure import RESULTS
from bench.reproduction.paper.answers import OWN, REAL
from bench.reproduction.paper.claims import ABSENT, BROKEN, FAILS, HOLDS, OPEN, broken, claims, counted, verdict
from bench.reproduction.paper.compare import Answers, difference, length_controlled, wins
from bench.reproduction.paper.table import READING, report


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
    with pytest.raises(ValueError, match="different prompts"):
        difference(base, some([0.0]))


def test_claims_about_every_base_need_every_base() -> None:
    level = {name: 0.1 * place for place, name in enumerate((*REAL, *OWN))}
    sets = {name: some([value] * 5) for name, value in level.items()}
    sets |= {f"{name} + shown": some([value + 0.05] * 5) for name, value in level.items()}
    sets["diffpo"] = some([0.45] * 5)
    assert counted(sets, "{} + shown") == ("higher 9, lower 0, open 0 of 9", HOLDS)
    assert counted(sets, "diffpo") == ("higher 5, lower 4, open 0 of 9", FAILS)
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
    text = report(results, READING.read_text(encoding="utf-8"))
    assert "nan" not in text
    assert text == (RESULTS / "paper_tables.md").read_text()  # else: python -m bench.reproduction.paper.table
