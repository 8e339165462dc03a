"""Exponents of power laws."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Exponent:
    """Of y = c * x ** exponent, with its interval; ``worst_fit``: the largest relative distance of a median from the line."""

    exponent: float
    low: float
    high: float
    worst_fit: float


def slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least-squares slopes [...] of log y [..., points] on log x [points]."""
    centred = np.log(x) - np.log(x).mean()
    return np.log(y) @ centred / (centred @ centred)


def exponent(sizes: Sequence[float], values: Sequence[Sequence[float]]) -> Exponent:
    """``values`` [sizes][rounds], positive. Raises ValueError with fewer than two sizes or a value that is not positive."""
    x = np.asarray(sizes, dtype=float)
    if len(set(sizes)) < 2 or len(sizes) != len(values) or min(min(rounds) for rounds in values) <= 0:
        raise ValueError(f"positive values of at least two different sizes are needed, got sizes {list(sizes)}")
    medians = np.array([np.median(rounds) for rounds in values])
    slope = float(slopes(x, medians))
    line = np.exp(np.log(medians).mean() + slope * (np.log(x) - np.log(x).mean()))
    random = np.random.default_rng(0)
    drawn = [np.asarray(r)[random.integers(len(r), size=(DRAWS, len(r)))] for r in values]
    again = slopes(x, np.stack([np.median(rounds, axis=1) for rounds in drawn], axis=1))
    low, high = np.quantile(again, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Exponent(slope, float(low), float(high), float(np.expm1(np.abs(np.log(medians / line)).max())))
