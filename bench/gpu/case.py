"""What the GPU benchmark measures: variants of one piece of work, to be timed in turn."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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
    error: Callable[[object], float]
    """How far an output is from a reference that is more exact than any variant; ours is tested by it."""
    bound: float
    """Most that ours may be off."""


def difference(output: object, reference: object) -> float:
    """Largest relative difference (2-norm) of two outputs' tensors, share of unequal entries for integers."""
    pairs = list(zip(tensors(output), tensors(reference), strict=True))
    if not pairs:
        raise ValueError("there is nothing to compare")
    return max(_difference(a, b) for a, b in pairs)


def _difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        raise ValueError(f"got {tuple(a.shape)}, expected {tuple(b.shape)}")
    if not a.is_floating_point():
        return (a != b).double().mean().item() if a.numel() else 0.0
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [part for part in value if isinstance(part, Tensor)] if isinstance(value, tuple | list) else []


def rounding(dtype: torch.dtype) -> float:
    """Most that rounding to this type changes a number, relative to it."""
    return torch.finfo(dtype).eps / 2
