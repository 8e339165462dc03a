"""Logits projection and argmax on GPUs: every program finds the best of a tile, a second kernel the best of all tiles.

Maxima are exact and of equal ones the lowest index counts, so the result does not depend on the order of anything. NaN
wins nowhere: maxima pass it over and it equals nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.consistency_loss.triton_math import capped
from engine.kernels.gpu.logits_tile import EMPTY, lowest, part_of, product_tile, rows_in_use, tiles, wins

BLOCK = 1024  # tiles looked at together by the second kernel


def linear_argmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, row_count: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As the public function; weight [vocabulary, d] in hidden's dtype."""
    (rows, d), v = hidden.shape, weight.shape[0]
    index = torch.empty(rows, dtype=torch.int64, device=hidden.device)
    value = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    if rows == 0:
        return index, value
    t = tiles(rows, d, hidden.dtype)
    column_tiles = triton.cdiv(v, t.columns)
    best = torch.empty(rows, column_tiles, dtype=torch.float32, device=hidden.device)
    best_index = torch.empty(rows, column_tiles, dtype=torch.int32, device=hidden.device)
    has_count = row_count is not None
    project_argmax_kernel[t.grid(rows, v)](
        hidden, weight, bias, row_count, best, best_index, rows, v, d, column_tiles, softcap or 1.0,
        HAS_BIAS=bias is not None, HAS_COUNT=has_count, HAS_CAP=bool(softcap), **t.options(hidden),
    )  # fmt: skip
    reduce_argmax_kernel[(rows,)](
        best, best_index, row_count, index, value, rows, column_tiles, HAS_COUNT=has_count, BLOCK=BLOCK, num_warps=4
    )
    return index, value


@triton.jit
def reach_of(top: tl.tensor, cap: tl.tensor) -> tl.tensor:
    """A bound below which no logit equals the largest one after the cap, as ``capped`` rounds.

    Values of ``capped`` are right to 2^-20 of themselves, so two that are equal differ by less than 2^-19 |z| before
    rounding; with the cap's slope between the two no less than 7/8 of ``slope``, the logits differ by less than
    2^-18 |z| / slope. Where that is not small against the cap, the slope may change: then there is no bound.
    """
    _, slope = capped(top, cap, True)
    width = tl.abs(top) * (2.0**-17) / slope
    return tl.where(width < cap / 16, top - width, float("-inf"))


@triton.jit
def best_of_part(
    z: tl.tensor, column: tl.tensor, cap: tl.tensor, HAS_CAP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Logits before the cap [ROWS, n], their columns [1, n] -> of every row the largest after the cap, and its index."""
    top = tl.max(z, 1)
    index = lowest(z == top[:, None], column)
    if HAS_CAP:
        # the cap keeps the order, but makes equal what was nearly so: applied to all only where that may have happened
        rival = (z >= reach_of(top, cap)[:, None]) & (column < index[:, None])
        if tl.max(rival.to(tl.int32)) > 0:  # of the tile at once: Triton 3.6 fails to reduce a row's values for sm_100
            s, _ = capped(z, cap, True)
            index = lowest(s == tl.max(s, 1)[:, None], column)
            top = tl.max(tl.where(column == index[:, None], z, float("-inf")), 1)
    value, _ = capped(top, cap, HAS_CAP)
    return value, index


@triton.jit(do_not_specialize=["rows", "column_tiles"])
def project_argmax_kernel(
    hidden: tl.tensor, weight: tl.tensor, bias: tl.tensor, row_count: tl.tensor, best: tl.tensor, best_index: tl.tensor,
    rows: tl.tensor, v: tl.tensor, d: tl.tensor, column_tiles: tl.tensor, cap: tl.tensor, HAS_BIAS: tl.constexpr,
    HAS_COUNT: tl.constexpr, HAS_CAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, WEIGHT_FIRST: tl.constexpr, WIDEN: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """Of a tile, per row: the largest value and its index. Tiles of the same columns run side by side."""
    row_tiles = tl.cdiv(rows, ROWS)
    first, tile = tl.program_id(0) % row_tiles * ROWS, tl.program_id(0) // row_tiles
    count = rows_in_use(row_count, rows, HAS_COUNT)
    if first >= count:
        return
    row = first + tl.arange(0, ROWS)
    column = tl.minimum(tile * COLUMNS + tl.arange(0, COLUMNS), v - 1)
    z = product_tile(
        hidden, weight, tl.minimum(row, count - 1), column, d, ROWS, COLUMNS, DEPTH, EVEN, WEIGHT_FIRST, WIDEN
    )
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    index = tl.full((ROWS,), EMPTY, tl.int32)
    for part in tl.static_range(PARTS):
        at = tile * COLUMNS + part * (COLUMNS // PARTS) + tl.arange(0, COLUMNS // PARTS)
        at = tl.minimum(at, v - 1)[None, :]  # the last one several times changes nothing
        s = part_of(z, part, PARTS)
        if HAS_BIAS:
            s += tl.load(bias + at).to(tl.float32)
        value, which = best_of_part(s, at, cap, HAS_CAP)
        better = wins(top, index, value, which)
        top, index = tl.where(better, value, top), tl.where(better, which, index)
    to, present = row.to(tl.int64) * column_tiles + tile, row < count
    tl.store(best + to, top, mask=present)
    tl.store(best_index + to, index, mask=present)


@triton.jit(do_not_specialize=["rows", "column_tiles"])
def reduce_argmax_kernel(
    best: tl.tensor, best_index: tl.tensor, row_count: tl.tensor, index: tl.tensor, value: tl.tensor, rows: tl.tensor,
    column_tiles: tl.tensor, HAS_COUNT: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One row, from its tiles."""
    row = tl.program_id(0).to(tl.int64)
    # a row that is not in use has no tiles
    tiles_of_row = tl.where(row < rows_in_use(row_count, rows, HAS_COUNT), column_tiles, 0)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.full((BLOCK,), EMPTY, tl.int32)
    for start in range(0, tiles_of_row, BLOCK):
        at = start + tl.arange(0, BLOCK)
        s = tl.load(best + row * column_tiles + at, mask=at < tiles_of_row, other=float("-inf"))
        which = tl.load(best_index + row * column_tiles + at, mask=at < tiles_of_row, other=EMPTY)
        better = wins(top, where, s, which)
        top, where = tl.where(better, s, top), tl.where(better, which, where)
    largest = tl.max(top, 0)
    winner = tl.min(tl.where(top == largest, where, EMPTY), 0)
    tl.store(index + row, tl.where(winner == EMPTY, -1, winner))
    tl.store(value + row, tl.where(winner == EMPTY, float("nan"), largest))
