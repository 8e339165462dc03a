"""Logits projection, Gumbel noise and argmax on GPUs: a sample of every row, and its log-probability, without logits.

The noise is that of engine.kernels.gumbel_noise: the same 64-bit integers, and logarithms in float32. What differs is
rounding: a unit or two in float32's last place, so that only tokens as close as that change places.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.consistency_loss.triton_math import capped, finite
from engine.kernels.gpu.logits_tile import EMPTY, lowest, part_of, product_tile, rows_in_use, tiles, wins
from engine.kernels.gumbel_noise import BITS, GOLDEN, MIX

BLOCK = 1024  # tiles looked at together by the second kernel
FIELDS = 4
"""Of a tile, per row: the best score, its logit, the largest logit, the sum of exponentials relative to that."""
INCREMENT = tl.constexpr(GOLDEN)
FACTORS = tl.constexpr(MIX)
UNUSED_BITS = tl.constexpr(64 - BITS)
ONE = tl.constexpr(1 << (BITS + 1))


def linear_sample(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor, seeds: Tensor, positions: Tensor,
    softcap: float | None, row_count: Tensor | None, log_probability: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As the public function; weight [vocabulary, d] in hidden's dtype."""
    (rows, d), v, device = hidden.shape, weight.shape[0], hidden.device
    index = torch.empty(rows, dtype=torch.int64, device=device)
    log_p = torch.empty(rows, dtype=torch.float32, device=device) if log_probability else None
    if rows == 0:
        return index, log_p
    # two programs per multiprocessor: one makes noise, about a third of the product's time, while the other multiplies
    t = tiles(min(rows, 128), d, hidden.dtype)
    column_tiles = triton.cdiv(v, t.columns)
    best = torch.empty(FIELDS if log_probability else 1, rows, column_tiles, dtype=torch.float32, device=device)
    best_index = torch.empty(rows, column_tiles, dtype=torch.int32, device=device)
    flags = {"HAS_COUNT": row_count is not None, "LOG_P": log_probability}
    project_sample_kernel[t.grid(rows, v)](
        hidden, weight, bias, temperature, seeds, positions, row_count, best, best_index, rows, v, d, column_tiles,
        softcap or 1.0, HAS_BIAS=bias is not None, HAS_CAP=bool(softcap), **flags, **t.options(hidden),
    )  # fmt: skip
    reduce_sample_kernel[(rows,)](
        best, best_index, row_count, index, log_p, rows, column_tiles, **flags, BLOCK=BLOCK, num_warps=4
    )
    return index, log_p


@triton.jit
def mixed(x: tl.tensor) -> tl.tensor:
    """splitmix64's output function, of uint64."""
    x = (x ^ (x >> 30)) * FACTORS[0]
    x = (x ^ (x >> 27)) * FACTORS[1]
    return x ^ (x >> 31)


@triton.jit
def row_key(seeds: tl.tensor, positions: tl.tensor) -> tl.tensor:
    return mixed(mixed(seeds.to(tl.uint64) + INCREMENT) + positions.to(tl.uint64) * INCREMENT)


@triton.jit
def noise(key: tl.tensor, token: tl.tensor) -> tl.tensor:
    """-log(-log(u)) in float32 with u = (bits + 1/2) / 2^52, for row keys and tokens (int32) that broadcast.

    u near 1 is the likely winner, and float32 has few numbers there: the logarithm is taken of the nearer end, 1 - u, which
    is exact as an integer before its one rounding. Then w = 1 - (1 - u) is rounded once more, by an amount that is known
    exactly and is, to first order, what is missing in log(w).
    """
    bits = mixed(key + (token + 1).to(tl.uint64) * INCREMENT) >> UNUSED_BITS
    numerator = (2 * bits + 1).to(tl.int64)  # of u = numerator / ONE
    near_one = numerator > ONE // 2
    s = tl.where(near_one, ONE - numerator, numerator).to(tl.float32) * (1.0 / ONE)
    w = 1.0 - s
    missing = (1.0 - w) - s
    exponential = -tl.log(tl.where(near_one, w, s)) - tl.where(near_one, missing, 0.0)
    return -tl.log(exponential)


@triton.jit(do_not_specialize=["rows", "column_tiles"])
def project_sample_kernel(
    hidden: tl.tensor, weight: tl.tensor, bias: tl.tensor, temperature: tl.tensor, seeds: tl.tensor,
    positions: tl.tensor, row_count: tl.tensor, best: tl.tensor, best_index: tl.tensor, rows: tl.tensor, v: tl.tensor,
    d: tl.tensor, column_tiles: tl.tensor, cap: tl.tensor, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_COUNT: tl.constexpr, LOG_P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, WEIGHT_FIRST: tl.constexpr, WIDEN: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """The fields of a tile. The score z + T g has the order of z / T + g, and is z itself at temperature 0."""
    row_tiles = tl.cdiv(rows, ROWS)
    first, tile = tl.program_id(0) % row_tiles * ROWS, tl.program_id(0) // row_tiles
    count = rows_in_use(row_count, rows, HAS_COUNT)
    if first >= count:
        return
    row = first + tl.arange(0, ROWS)
    existing = tl.minimum(row, count - 1)
    column = tl.minimum(tile * COLUMNS + tl.arange(0, COLUMNS), v - 1)
    z = product_tile(hidden, weight, existing, column, d, ROWS, COLUMNS, DEPTH, EVEN, WEIGHT_FIRST, WIDEN)
    key = row_key(tl.load(seeds + existing), tl.load(positions + existing))
    t = tl.load(temperature + existing)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    index = tl.full((ROWS,), EMPTY, tl.int32)
    logit, largest = top, top
    total = tl.zeros((ROWS,), tl.float32)
    for part in tl.static_range(PARTS):
        at = tile * COLUMNS + part * (COLUMNS // PARTS) + tl.arange(0, COLUMNS // PARTS)
        s = part_of(z, part, PARTS)
        if HAS_BIAS:
            s += tl.load(bias + tl.minimum(at, v - 1)).to(tl.float32)[None, :]
        s, _ = capped(s, cap, HAS_CAP)
        s = tl.where((at < v)[None, :], s, float("nan"))  # what is no number wins nowhere and adds nothing
        score = s + t[:, None] * noise(key[:, None], at[None, :])
        highest = tl.max(score, 1)
        which = lowest(score == highest[:, None], at[None, :])
        better = wins(top, index, highest, which)
        top, index = tl.where(better, highest, top), tl.where(better, which, index)
        if LOG_P:
            own = tl.max(tl.where(at[None, :] == which[:, None], s, float("-inf")), 1)
            logit = tl.where(better, own, logit)
            before, largest = largest, tl.maximum(largest, tl.max(tl.where(s == s, s, float("-inf")), 1))
            base = finite(largest)
            e = tl.exp(s - base[:, None])
            total = total * tl.exp(before - base) + tl.sum(tl.where(s == s, e, 0.0), 1)
    to, present, field = row.to(tl.int64) * column_tiles + tile, row < count, rows.to(tl.int64) * column_tiles
    tl.store(best + to, top, mask=present)
    tl.store(best_index + to, index, mask=present)
    if LOG_P:
        tl.store(best + field + to, logit, mask=present)
        tl.store(best + 2 * field + to, largest, mask=present)
        tl.store(best + 3 * field + to, total, mask=present)


@triton.jit(do_not_specialize=["rows", "column_tiles"])
def reduce_sample_kernel(
    best: tl.tensor, best_index: tl.tensor, row_count: tl.tensor, index: tl.tensor, log_p: tl.tensor, rows: tl.tensor,
    column_tiles: tl.tensor, HAS_COUNT: tl.constexpr, LOG_P: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One row, from its tiles."""
    row = tl.program_id(0).to(tl.int64)
    # a row that is not in use has no tiles
    tiles_of_row = tl.where(row < rows_in_use(row_count, rows, HAS_COUNT), column_tiles, 0)
    field = rows.to(tl.int64) * column_tiles
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.full((BLOCK,), EMPTY, tl.int32)
    logit, largest = top, top
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tiles_of_row, BLOCK):
        at = row * column_tiles + start + tl.arange(0, BLOCK)
        inside = start + tl.arange(0, BLOCK) < tiles_of_row
        score = tl.load(best + at, mask=inside, other=float("-inf"))
        which = tl.load(best_index + at, mask=inside, other=EMPTY)
        better = wins(top, where, score, which)
        top, where = tl.where(better, score, top), tl.where(better, which, where)
        if LOG_P:
            logit = tl.where(better, tl.load(best + field + at, mask=inside, other=0.0), logit)
            before, highest = largest, tl.load(best + 2 * field + at, mask=inside, other=float("-inf"))
            largest = tl.maximum(before, highest)
            base = finite(largest)
            total *= tl.exp(before - base)
            total += tl.load(best + 3 * field + at, mask=inside, other=0.0) * tl.exp(highest - base)
    winner = tl.min(tl.where(top == tl.max(top, 0), where, EMPTY), 0)
    tl.store(index + row, tl.where(winner == EMPTY, -1, winner))
    if LOG_P:
        own = tl.max(tl.where(where == winner, logit, float("-inf")), 0)
        base = finite(tl.max(largest, 0))
        value = (own - base) - tl.log(tl.sum(total * tl.exp(largest - base), 0))
        tl.store(log_p + row, tl.where(winner == EMPTY, float("nan"), value))
