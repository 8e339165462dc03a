"""Gumbel noise that is a pure function of (seed, position, token), by a counter-based generator."""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # the increment of splitmix64
MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # the multipliers of its output function
BITS = 52


def gumbel_noise(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise [rows, vocabulary] float64 for int64 seeds and positions [rows].

    splitmix64's output function (Steele, Lea and Flood 2014) over seed, position and token, on any device, in any order.
    """
    key = _mix(_mix(seeds + _signed(GOLDEN)) + positions * _signed(GOLDEN))
    token = torch.arange(1, vocabulary + 1, device=seeds.device)
    bits = _shift(_mix(key[:, None] + token * _signed(GOLDEN)), 64 - BITS)
    uniform = (bits.double() + 0.5) * 2.0**-BITS  # exact, never 0 or 1
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    for shift, factor in zip((30, 27), MIX, strict=True):
        x = (x ^ _shift(x, shift)) * _signed(factor)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The int64 of the same bits."""
    return x - (1 << 64) if x >> 63 else x
