"""What the GPU benchmark measures: variants of one piece of work, to be timed in turn."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """One piece of work. All variants get the same inputs; their outputs are compared before they are timed."""

    operation: str
    shape: str
    variants: dict[str, Callable[[], object]]
    """By name; "ours" among them. A variant whose library is absent is left out."""
    bytes: int
    """Least that must be read and written."""
    flops: int
