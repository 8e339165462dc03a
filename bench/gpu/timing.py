"""Time of short GPU work, in turn and with cold caches."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]
TARGET_SECONDS = 0.01
"""Work between two events: long enough that their own resolution does not count."""
AHEAD = 8
"""Writes of the flush buffer before the first call, besides one for every call."""


class Stopwatch:
    """Times calls on a device; on a CPU by the clock, so that every path runs there too."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # larger than any GPU's L2 cache: writing it leaves nothing of the last call there
        size = 1 << 28 if device.type == "cuda" else 1 << 10
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def seconds(self, call: Call, repeats: int) -> float:
        """Mean time of one of ``repeats`` calls, each with a cold L2 cache, without what launching costs the host."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - start) / repeats
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        # work to begin with, behind which the launches queue up: else the device would wait for those of short kernels
        for _ in range(repeats + AHEAD):
            self._flush.zero_()
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


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
