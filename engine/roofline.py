"""What a device can do at best: bytes and floating-point operations per second, measured on it."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Roofline:
    """The two ceilings."""

    bytes_per_second: float
    """Read and written, together."""
    flops_per_second: float
    """Of matrix products."""

    def floor(self, bytes_moved: int, flops: int) -> float:
        """Seconds that no implementation can do without: the larger of moving the bytes and of the arithmetic."""
        return max(bytes_moved / self.bytes_per_second, flops / self.flops_per_second)


@torch.inference_mode()
def measured(device: torch.device, dtype: torch.dtype, copied: int = 1 << 28, size: int = 4096) -> Roofline:
    """By a copy of ``copied`` bytes and a product of two [size, size] matrices of ``dtype``; the best of a few rounds.

    Takes some milliseconds on a GPU, and the larger of ``2 * copied`` bytes and three matrices of its memory, which stays
    in PyTorch's cache.
    """
    return Roofline(2 * copied / _copy_seconds(device, copied), 2 * size**3 / _product_seconds(device, dtype, size))


def _copy_seconds(device: torch.device, count: int) -> float:
    source = torch.zeros(count, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return _seconds(lambda: target.copy_(source), device)


def _product_seconds(device: torch.device, dtype: torch.dtype, size: int) -> float:
    # of its own: another draw from the default one would change what the process that embeds the engine samples
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.zeros(size, size, dtype=dtype, device=device).normal_(generator=generator) for _ in range(2))
    return _seconds(lambda: a @ b, device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    call()
    if device.type != "cuda":
        found = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return min(found)
    with torch.cuda.device(device):  # an event is recorded on the current device
        events = [torch.cuda.Event(enable_timing=True) for _ in range(ROUNDS + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
    events[-1].synchronize()  # not the whole device, which may be capturing a graph elsewhere
    return min(a.elapsed_time(b) for a, b in itertools.pairwise(events)) / 1e3
