"""How many rows a sequence feeds per step: as many as are expected to pay for themselves."""

import logging
from dataclasses import dataclass

import torch

from engine.kernels.jacobi_state import DECAY, MOST_GUESSES
from engine.roofline import Roofline, measured

logger = logging.getLogger("engine.window")

CPU_KNEE_ROWS = 11
"""Of two server cores in float32, see bench/suite/kernels.py."""
KNEE_LIMITS = (16, 1024)
"""What a measurement on a GPU can make of it: one taken beside other work may be far off."""
A100_CEILINGS = {2: Roofline(2.04e12, 312e12), 4: Roofline(2.04e12, 19.5e12)}
"""By bytes per weight, from its data sheet: for a GPU that has no memory left to measure with. Newer chips have gained more in
arithmetic than in bandwidth, so this knee is rather too low than too high; it is rows beyond the real one that cost."""


def knee_rows(device: torch.device, dtype: torch.dtype) -> int:
    """Rows at which a step's arithmetic takes as long as reading the weights once: below it rows are nearly free.

    Measured where the device is a GPU, which takes some milliseconds.
    """
    if device.type != "cuda":
        return CPU_KNEE_ROWS
    try:
        ceilings = measured(device, dtype)
    except torch.OutOfMemoryError:
        ceilings = A100_CEILINGS[dtype.itemsize]
        logger.warning("no memory is left to measure %s with: taking an A100's ceilings for its own", device)
    return bounded_knee(ceilings, dtype)


def bounded_knee(roofline: Roofline, dtype: torch.dtype) -> int:
    """A row costs 2 FLOPs per weight, the weight ``dtype.itemsize`` bytes: they are even at the ratio of both ceilings."""
    rows = roofline.flops_per_second / roofline.bytes_per_second * dtype.itemsize / 2
    return max(KNEE_LIMITS[0], min(KNEE_LIMITS[1], round(rows)))


@dataclass(slots=True)
class Rate:
    """A success probability that follows what was seen lately."""

    value: float
    weight: float

    def update(self, successes: int, failures: int) -> None:
        """Fades what was known, once per observation, and adds the new ones."""
        for count, outcome in ((successes, 1.0), (failures, 0.0)):
            if count:
                kept = self.weight * DECAY**count
                fresh = (1 - DECAY**count) / (1 - DECAY)
                self.value = (self.value * kept + outcome * fresh) / (kept + fresh)
                self.weight = kept + fresh


class WindowPolicy:
    """Chooses the number of guesses a sequence feeds beside its one certain row.

    Two rates describe a guess: ``first``, that it is right at the position where the last one was wrong (a new draft, a
    re-alignment), and ``run``, that it goes on being right. A step of R rows costs about knee + R in units of one row's
    arithmetic, so a guess is worth its row while its chance of acceptance is at least the tokens per unit of cost that the
    step yields anyway. With no acceptance that leaves the one certain row: plain greedy decoding.
    """

    def __init__(self, knee: int) -> None:
        self.knee = knee
        self.first = Rate(0.5, 2.0)
        self.run = Rate(0.9, 3.0)
        self.in_run = False

    def guesses(self, available: int, sequences: int) -> int:
        """Guesses to feed, of ``available``, with this many sequences in the batch."""
        chance = self.run.value if self.in_run else self.first.value
        tokens, count = 1.0, 0
        while count < min(available, MOST_GUESSES):
            if chance < sequences * tokens / (self.knee + sequences * (count + 1)):
                break
            tokens += chance
            chance *= self.run.value
            count += 1
        return count

    def observe(self, hits: int, miss: bool) -> None:
        """``hits`` guesses in a row were right, then one was wrong (``miss``) or none was left to check."""
        rest = hits
        if not self.in_run and hits + miss:
            self.first.update(1 if hits else 0, 0 if hits else 1)
            rest = hits - 1 if hits else 0
        if self.in_run or hits:
            self.run.update(rest, int(miss))
        self.in_run = (self.in_run or hits > 0) and not miss
