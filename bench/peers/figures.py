"""Figures of bench/results/peers.json: means over prompts with intervals, percentiles of latency, ratios of pairs."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.peers.catalogue import ALIGNER
from bench.reproduction.paper.claims import broken
from bench.reproduction.paper.compare import Answers
from engine.evaluate.statistics import FEWEST, Estimate, paired_bootstrap

Results = dict[str, Any]
Columns = dict[str, list[Any]]
PARTS = ("draft", "refinement", "reward")
UNTRAINED = "untrained corrector"
"""What Aligner-style is called where the refiner is shown a prompt that it was not trained on."""


def columns(results: Results, method: str, batch: str) -> Columns | None:
    """What was measured of a method at a batch size."""
    found: Columns | None = results["methods"].get(method, {}).get(batch)
    return found


def batches(results: Results) -> list[str]:
    """Names of the batch sizes that were measured, smallest first."""
    return sorted((name for name, loads in results["loads"].items() if loads), key=lambda name: int(name.split()[1]))


def untrained(results: Results) -> bool:
    """Whether the run had no model of its own that reads drafts in its prompt."""
    return results["settings"]["models"]["corrector"] is None


def label(results: Results, method: str) -> str:
    """What a method is called on the page and in the picture."""
    return method.replace(ALIGNER, UNTRAINED, 1) if untrained(results) and method.startswith(ALIGNER) else method


def scores(results: Results, method: str) -> dict[int, float]:
    """Reward by prompt."""
    return by_prompt(results, method, "score")


def by_prompt(results: Results, method: str, column: str) -> dict[int, float]:
    """The answers at several batch sizes, which sampling noise and rounding apart are the same, averaged; prompts without a
    value are left out."""
    found: dict[int, list[float]] = defaultdict(list)
    for measured in results["methods"][method].values():
        if column in measured:
            for prompt, value in zip(measured["prompt"], measured[column], strict=True):
                if value is not None:
                    found[prompt].append(value)
    return {prompt: sum(values) / len(values) for prompt, values in sorted(found.items())}


def text_broken(results: Results, method: str) -> bool:
    """By the rule of the paper's tables, on the prompts that the method answered; False where too little is known."""
    own = by_prompt(results, method, "nats")
    if len(own) < FEWEST:
        return False
    sets = {method: Answers({"nats": list(own.values())})}
    for model, found in results.get("real", {}).items():
        pairs = zip(found["prompt"], found["nats"], strict=True)
        sets[model] = Answers({"nats": [nats for prompt, nats in pairs if prompt in own]})
    return broken(sets, method)


def mean(values: dict[int, float]) -> Estimate:
    """Over prompts."""
    return paired_bootstrap(list(values.values()))


def difference(results: Results, method: str, other: str) -> Estimate:
    """Reward minus that of another method, on the prompts that both answered."""
    ours, theirs = scores(results, method), scores(results, other)
    return paired_bootstrap([ours[prompt] - theirs[prompt] for prompt in ours if prompt in theirs])


def seconds(measured: Columns) -> list[float]:
    """From request to answer."""
    return [sum(parts) for parts in zip(*(measured[part] for part in PARTS), strict=True)]


def percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent))


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def ratio(results: Results, method: str, other: str, batch: str, *, cpu: bool = False) -> Estimate | None:
    """Geometric mean, over the requests that both answered in the same batch, of the seconds of one over the other's, or of the
    CPU seconds of the batch; the interval is over batches, whose requests share what the machine did at the time. Those of the
    same prompts, which tell nothing of other prompts, are averaged and count once."""
    ours, theirs = (columns(results, name, batch) for name in (method, other))
    if ours is None or theirs is None:
        return None
    mine, their = (found["cpu"] if cpu else seconds(found) for found in (ours, theirs))
    pairs = dict(zip(_keys(theirs), their, strict=True))
    shared = [
        (turn, math.log(value / pairs[turn, prompt]))
        for (turn, prompt), value in zip(_keys(ours), mine, strict=True)
        if (turn, prompt) in pairs
    ]
    if not shared:
        return None
    first: dict[int, int] = {}  # prompt of every batch
    for turn, prompt in _keys(ours):
        first[turn] = min(prompt, first.get(turn, prompt))
    found = paired_bootstrap([value for _, value in shared], [first[turn] for turn, _ in shared])
    return Estimate(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.cases, found.prompts)


def _keys(measured: Columns) -> list[tuple[int, int]]:
    return list(zip(measured["turn"], measured["prompt"], strict=True))
