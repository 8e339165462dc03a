"""One piece of work and the implementations that are timed on it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

Shape = tuple[int, ...]
SIZES = ("tiny", "quick", "full")


@dataclass(frozen=True)
class Case:
    """Implementations of one piece of work, by name; "engine" is this project's.

    A call returns what the implementations have to agree in: tensors (to ``tolerance``, relative to the norm) or anything
    else (exactly).
    """

    calls: dict[str, Callable[..., Any]]
    tolerance: float = 1e-4
    fresh: dict[str, Callable[[], Any]] | None = None
    """Where a call uses its input up: makes another input for it, outside of the time."""
    close: Callable[[], None] = lambda: None

    def once(self, implementation: str) -> Any:
        """What a first call returns."""
        call = self.calls[implementation]
        return call(self.fresh[implementation]()) if self.fresh else call()

    def check(self, implementations: Iterable[str]) -> None:
        """Raises AssertionError unless they all do the same work."""
        (first, expected), *others = ((name, self.once(name)) for name in implementations)
        for name, found in others:
            difference = distance(expected, found)
            assert difference <= self.tolerance, (
                f"{name} is {difference:.1e} from {first}, at most {self.tolerance:.1e} is right"
            )


def distance(a: Any, b: Any) -> float:
    """Relative, of the norms; infinite where things differ that have to be equal."""
    if isinstance(a, tuple):
        return max(distance(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        a, b = a.detach().double(), b.detach().double()
        return float((a - b).norm() / a.norm().clamp_min(1e-30))
    return 0.0 if a == b else float("inf")


@dataclass(frozen=True)
class Operation:
    """What can be built in several shapes and dtypes."""

    build: Callable[[Shape, torch.dtype], Case]
    implementations: tuple[str, ...]
    shapes: dict[str, tuple[Shape, ...]]
    """By size of the run; "full" adds to "quick"."""
    dtypes: tuple[str, ...] = ("float32",)
    only_full: tuple[str, ...] = ()
    """Implementations that take too long for a quick run."""

    def named(self, size: str) -> tuple[str, ...]:
        """The implementations of a run."""
        return self.implementations + (self.only_full if size == "full" else ())

    def parameters(self, size: str) -> list[tuple[str, str, str]]:
        """Shape, dtype and implementation of every test; implementations of one piece of work next to each other."""
        shapes = self.shapes[size] if size != "full" else (*self.shapes["quick"], *self.shapes["full"])
        return [
            ("x".join(map(str, shape)), dtype, name)
            for shape in shapes for dtype in self.dtypes for name in self.named(size)
        ]  # fmt: skip


def parse(shape: str) -> Shape:
    return tuple(map(int, shape.split("x")))
