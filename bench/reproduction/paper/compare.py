"""Sets of answers to the same prompts, compared prompt by prompt, and estimates as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.evaluate.statistics import (
    Estimate,
    length_controlled_win_rate,
    paired_bootstrap,
    preferences,
    win_rate,
)


@dataclass(frozen=True)
class Answers:
    """Columns of ``bench.reproduction.paper.measure``: one entry per prompt."""

    columns: dict[str, list[Any]]

    def mean(self, name: str) -> Estimate | None:
        """Of a column, over the prompts where it has a value; None where it has none."""
        values = [value for value in self.columns.get(name, []) if value is not None]
        return mean(values) if values else None

    @property
    def length(self) -> str:
        """Mean characters."""
        return f"{np.mean(self.columns['characters']):.0f}"


def mean(values: Sequence[float] | np.ndarray, prompts: Sequence[int] | None = None) -> Estimate:
    """With an interval that draws prompts."""
    return paired_bootstrap(values, prompts)


def rewards(one: Answers, other: Answers) -> tuple[list[float], list[float]]:
    """Of the same prompts. Raises ValueError where the sets have others."""
    if one.columns["prompt"] != other.columns["prompt"]:
        raise ValueError("the sets answer different prompts: measure them anew")
    return one.columns["reward"], other.columns["reward"]


def difference(one: Answers, other: Answers) -> Estimate:
    """Of rewards, prompt by prompt."""
    return paired_bootstrap(np.subtract(*rewards(one, other)))


def wins(one: Answers, other: Answers) -> Estimate:
    """Share of prompts whose answer has the higher reward."""
    return win_rate(*rewards(one, other))


def length_controlled(one: Answers, other: Answers) -> Estimate | None:
    """The same for answers of equal length; None where one's are all longer, or all shorter: that would be extrapolated."""
    lengths = one.columns["characters"], other.columns["characters"]
    longer = np.subtract(*lengths)
    if longer.min() > 0 or longer.max() < 0 or longer.min() == longer.max():
        return None
    return length_controlled_win_rate(preferences(*rewards(one, other)), *lengths)


def shown(estimate: Estimate | None, digits: int = 2) -> str:
    """Mean and interval; a dash where there is nothing."""
    if estimate is None:
        return "–"
    return f"{estimate.mean:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"


def percent(estimate: Estimate | None) -> str:
    """The same in per cent."""
    if estimate is None:
        return "–"
    return f"{100 * estimate.mean:.0f} % ({100 * estimate.low:.0f} to {100 * estimate.high:.0f})"
