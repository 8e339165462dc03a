"""What the loss's Triton kernels share: the soft-cap, online sums over the vocabulary, and their combination.

A row's sums are held relative to its largest logit, never as a finished lse: where lse is 15, its last place is 1e-6, and
every probability computed from it would carry that error.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FIELDS = 6
"""Of a row, or of one part of its vocabulary: maximum, sum of exponentials, the same at the KL's temperature, sum of
exponential times exponent, logit of the label, index of the maximum (a float: exact below 2^24)."""


@triton.jit
def capped(z: tl.tensor, cap: tl.tensor, HAS_CAP: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """cap * tanh(z / cap) and its derivative, both without cancellation."""
    if HAS_CAP:
        x = z / cap
        t = tl.exp(-2.0 * tl.abs(x))
        far = (1.0 - t) / (1.0 + t)
        q = x * x
        near = tl.abs(x) * (1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315 + q * (62.0 / 2835)))))
        size = cap * tl.where(q < 0.0625, near, far)
        return tl.where(x < 0.0, -size, size), 4.0 * t / ((1.0 + t) * (1.0 + t))
    else:
        return z, tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def half_of(tile: tl.tensor, HALF: tl.constexpr) -> tl.tensor:
    """Left or right columns."""
    return tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)).permute(0, 2, 1).split()[HALF]


@triton.jit
def finite(m: tl.tensor) -> tl.tensor:
    """Zero for a maximum of -inf, which would make the exponents of its terms NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def weighted(e: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """e * exponent, zero where e is (0 * -inf)."""
    return tl.where(e == 0.0, 0.0, e * exponent)


@triton.jit
def moved(
    m: tl.tensor, l: tl.tensor, lt: tl.tensor, a: tl.tensor, base: tl.tensor, inv_tau: tl.tensor,
    HAS_TAU: tl.constexpr, STATS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """The sums taken relative to m, relative to ``base`` instead."""
    shrink = tl.exp(m - base)
    if STATS:
        a = weighted(shrink, a + weighted(l, m - base))
    if HAS_TAU:
        lt = lt * tl.exp((m - base) * inv_tau)
    return l * shrink, lt, a


@triton.jit
def merged(
    m: tl.tensor, l: tl.tensor, lt: tl.tensor, a: tl.tensor, best: tl.tensor, inv_tau: tl.tensor,
    HAS_TAU: tl.constexpr, STATS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """One row's sums from those of its parts [parts]; of equal maxima the lowest index."""
    top = tl.max(m, 0)
    l, lt, a = moved(m, l, lt, a, finite(top), inv_tau, HAS_TAU, STATS)
    return top, tl.sum(l, 0), tl.sum(lt, 0), tl.sum(a, 0), tl.min(tl.where(m == top, best, float("inf")), 0)


@triton.jit
def store_sums(
    to: tl.tensor, stride: tl.tensor, mask: tl.tensor, m: tl.tensor, l: tl.tensor, lt: tl.tensor, a: tl.tensor,
    label: tl.tensor, best: tl.tensor, HAS_TAU: tl.constexpr, STATS: tl.constexpr,
) -> None:  # fmt: skip
    tl.store(to, m, mask=mask)
    tl.store(to + stride, l, mask=mask)
    if HAS_TAU:
        tl.store(to + 2 * stride, lt, mask=mask)
    if STATS:
        tl.store(to + 3 * stride, a, mask=mask)
        tl.store(to + 5 * stride, best, mask=mask)
    tl.store(to + 4 * stride, label, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def combine_kernel(
    partial: tl.tensor, sums: tl.tensor, rows: tl.tensor, splits: tl.tensor, inv_tau: tl.tensor,
    HAS_TAU: tl.constexpr, STATS: tl.constexpr, SPLITS: tl.constexpr,
) -> None:  # fmt: skip
    """partial [FIELDS, rows, splits] -> sums [FIELDS, rows]: logarithms of the two sums and the entropy in their place."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS)
    mask = part < splits
    stride = rows.to(tl.int64) * splits
    at = partial + row * splits + part
    m = tl.load(at, mask=mask, other=float("-inf"))
    l = tl.load(at + stride, mask=mask, other=0.0)
    lt, a, best = l, l, m
    if HAS_TAU:
        lt = tl.load(at + 2 * stride, mask=mask, other=0.0)
    if STATS:
        a = tl.load(at + 3 * stride, mask=mask, other=0.0)
        best = tl.load(at + 5 * stride, mask=mask, other=float("inf"))
    label = tl.sum(tl.load(at + 4 * stride, mask=mask, other=0.0), 0)
    m, l, lt, a, best = merged(m, l, lt, a, best, inv_tau, HAS_TAU, STATS)
    log = tl.log(l)
    to, everywhere = sums + row, row < rows
    store_sums(to, rows.to(tl.int64), everywhere, finite(m), log, tl.log(lt), log - a / l, label, best, HAS_TAU, STATS)


def combined(partial: Tensor, temperature: float, stats: bool) -> Tensor:
    """Of every row, from the sums over parts of its vocabulary: [FIELDS, rows, splits] -> [FIELDS, rows]."""
    _, rows, splits = partial.shape
    sums = torch.empty(FIELDS, rows, dtype=torch.float32, device=partial.device)
    if rows:
        combine_kernel[(rows,)](
            partial, sums, rows, splits, 1.0 / temperature, HAS_TAU=temperature != 1.0, STATS=stats,
            SPLITS=triton.next_power_of_2(splits), num_warps=1,
        )  # fmt: skip
    return sums
