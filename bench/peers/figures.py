"""Figures of bench/results/peers.json: means over prompts with intervals, percentiles of latency, ratios of pairs."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.evaluate.statistics import Estimate, paired_bootstrap

Results = dict[str, Any]
Columns = dict[str, list[Any]]
PARTS = ("draft", "refinement", "reward")


def columns(results: Results, method: str, batch: str) -> Columns | None:
    """What was measured of a method at a batch size."""
    found: Columns | None = results["methods"].get(method, {}).get(batch)
    return found


def batches(results: Results) -> list[str]:
    """Names of the batch sizes that were measured, smallest first."""
    return sorted((name for name, loads in results["loads"].items() if loads), key=lambda name: int(name.split()[1]))


def scores(results: Results, method: str) -> dict[int, float]:
    """Reward by prompt; the answers at several batch sizes, which sampling noise and rounding apart are the same, averaged."""
    found: dict[int, list[float]] = defaultdict(list)
    for measured in results["methods"][method].values():
        for prompt, score in zip(measured["prompt"], measured["score"], strict=True):
            found[prompt].append(score)
    return {prompt: sum(values) / len(values) for prompt, values in sorted(found.items())}


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
    CPU seconds of the batch; the interval is over batches, whose requests share what the machine did at the time."""
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
    found = paired_bootstrap([value for _, value in shared], [turn for turn, _ in shared])
    return Estimate(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.cases, found.prompts)


def _keys(measured: Columns) -> list[tuple[int, int]]:
    return list(zip(measured["turn"], measured["prompt"], strict=True))
