"""Time of short GPU work, in turn and with cold caches, and what the device can do at best."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], object]
TARGET_SECONDS = 0.01
"""Work between two events: long enough that their own resolution does not count."""


class Stopwatch:
    """Times calls on a device; on a CPU by the clock, so that every path runs there too."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # larger than any GPU's L2 cache: writing it leaves nothing of the last call there
        size = 1 << 28 if device.type == "cuda" else 1 << 10
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def seconds(self, call: Call, repeats: int) -> float:
        """Mean time of one of ``repeats`` calls, each with a cold L2 cache; launches are queued ahead of the device."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - start) / repeats
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for begin, end in pairs:
            self._flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return sum(begin.elapsed_time(end) for begin, end in pairs) / repeats / 1e3

    def interleaved(self, variants: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
        """Seconds per call in every round, the variants in turn: a slow moment of the machine meets all of them."""
        repeats = {}
        for name, call in variants.items():
            self.seconds(call, 1)
            repeats[name] = max(1, min(50, round(TARGET_SECONDS / max(self.seconds(call, 1), 1e-6))))
            if self.device.type != "cuda":
                repeats[name] = 1
        found: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name, call in variants.items():
                found[name].append(self.seconds(call, repeats[name]))
        return found


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured on the device itself, in the same run as what is held against them."""

    bytes_per_second: float
    """A copy, read and written bytes together."""
    flops_per_second: float
    """A large bfloat16 product of the vendor's library."""

    def floor(self, bytes_moved: int, flops: int) -> float:
        """Seconds that no implementation can do without: the larger of moving the bytes and of the arithmetic."""
        return max(bytes_moved / self.bytes_per_second, flops / self.flops_per_second)


def ceilings(watch: Stopwatch) -> Ceilings:
    """The best of a few rounds, which is what a ceiling is."""
    cuda = watch.device.type == "cuda"
    source = torch.empty(1 << 30 if cuda else 1 << 20, dtype=torch.int8, device=watch.device)
    target = torch.empty_like(source)
    n = 8192 if cuda else 64
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=watch.device) for _ in range(2))
    product: Tensor = torch.empty_like(a)
    variants: dict[str, Call] = {
        "copy": lambda: target.copy_(source),
        "product": lambda: torch.mm(a, b, out=product),
    }
    seconds = watch.interleaved(variants, 5 if cuda else 1)
    return Ceilings(2 * source.numel() / min(seconds["copy"]), 2 * n**3 / min(seconds["product"]))


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
