"""The noise of the Triton projection with sampling against float64; run as linear_argmax_triton_cases.py is."""

import pytest
import torch
import triton
import triton.language as tl

from engine.kernels.gpu.linear_sample import noise, row_key
from engine.kernels.gumbel_noise import gumbel_noise
from tests.kernels.triton_device import DEVICE, INTERPRETED

VOCABULARY = 1 << 19
"""Noise of 12 and more, where most could go wrong, comes once in 200000 tokens."""
BLOCK = 1 << 15 if INTERPRETED else 1 << 10
BOUND = 1e-6
"""What linear_sample promises, relative to max(1, |noise|)."""


@triton.jit
def noise_kernel(
    seeds: tl.tensor, positions: tl.tensor, out: tl.tensor, vocabulary: tl.tensor, BLOCK: tl.constexpr
) -> None:
    row, token = tl.program_id(1) + tl.arange(0, 1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = row_key(tl.load(seeds + row), tl.load(positions + row))
    tl.store(out + row[:, None] * vocabulary + token[None, :], noise(key[:, None], token[None, :]))


@pytest.mark.parametrize("seed", [0, 12345, -1, 2**63 - 1])
def test_noise_is_within_its_bound(seed: int) -> None:
    """Of every token, at positions from the first on."""
    positions = torch.tensor([0, 1, 777, 2**31 + 5], device=DEVICE)
    seeds = torch.full_like(positions, seed)
    found = torch.empty(len(positions), VOCABULARY, device=DEVICE)
    noise_kernel[(VOCABULARY // BLOCK, len(positions))](seeds, positions, found, VOCABULARY, BLOCK=BLOCK)
    exact = gumbel_noise(seeds, positions, VOCABULARY)
    error = (found.double() - exact).abs() / exact.abs().clamp_min(1.0)
    assert exact.max() > 13
    assert error.max() <= BOUND
