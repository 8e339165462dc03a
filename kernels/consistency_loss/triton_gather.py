"""Products over a part of the summed dimension: lists of what counts, and a matrix product that walks such lists.

Lists and their lengths stay on the device: a kernel reads how far it has to go, so nothing waits for the host, and a list
may have any length up to everything.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.consistency_loss.triton_math import half_of
from engine.kernels.consistency_loss.triton_products import Tiles

LIST_BLOCK = 4096


def tiles(dtype: torch.dtype) -> Tiles:
    """128 x 256 for tensor cores: per byte that it gathers, a smaller tile would do less than an H200's L2 cache feeds."""
    return Tiles(64, 64, 16, 4, 3) if dtype == torch.float32 else Tiles(128, 256, 64, 8, 5)


@dataclass(frozen=True, slots=True)
class Lists:
    """What of ``length`` things counts, for each of n tiles."""

    index: Tensor
    """[n, length] int32: the things of a list in ascending order, then anything."""
    count: Tensor
    """[n] int32."""

    @property
    def length(self) -> int:
        return self.index.shape[1]


def listed(flags: Tensor, limit: float) -> Lists:
    """flags [n, length] int8 -> the indices set; all of them where the list would be longer than ``limit`` of length."""
    n, length = flags.shape
    lists = Lists(flags.new_empty(n, length, dtype=torch.int32), flags.new_empty(n, dtype=torch.int32))
    if n:
        block = min(LIST_BLOCK, triton.next_power_of_2(length))
        list_kernel[(n,)](flags, lists.index, lists.count, length, int(limit * length), BLOCK=block, num_warps=8)
    return lists


def add_gathered(
    out: Tensor, a: Tensor, b: Tensor, lists: Lists, t: Tiles, tail: Tensor, mean: Tensor, first: bool
) -> None:
    """out[i * rows + m] += sum over k in list i of a[i, k, m] * b[k], and tail[i * rows + m] * mean[i] for the others.

    out [up to n * rows, d] float32, overwritten if ``first``; a [n, k, t.rows] strided, b [k, d] of one dtype; tail [as
    out] and mean [n, d] float32, unused by lists of everything.
    """
    d = b.shape[1]
    column_tiles = triton.cdiv(d, t.columns)
    if out.numel():
        gathered_kernel[(lists.count.numel() * column_tiles,)](
            a, a.stride(0), a.stride(1), b, lists.index, lists.count, lists.length, tail, mean, out, out.shape[0], d,
            ADD=not first, ROWS=t.rows, COLUMNS=t.columns, DEPTH=t.depth, EVEN=d % t.columns == 0, WIDEN=b.is_cpu,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip


@triton.jit(do_not_specialize=["limit"])
def list_kernel(
    flags: tl.tensor, index: tl.tensor, count: tl.tensor, length: tl.tensor, limit: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """One list: in order, so that the sums over it repeat to the bit."""
    row = tl.program_id(0).to(tl.int64)
    flags += row * length
    index += row * length
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, length, BLOCK):
        total += tl.load(flags + start + lane, mask=start + lane < length, other=0).to(tl.int32)
    everything = (tl.sum(total, 0) > limit).to(tl.int32)
    before = 0
    for start in range(0, length, BLOCK):
        inside = start + lane < length
        flag = tl.where(inside, tl.load(flags + start + lane, mask=inside, other=0).to(tl.int32) | everything, 0)
        tl.store(index + before + tl.cumsum(flag, 0) - flag, start + lane, mask=flag != 0)
        before += tl.sum(flag, 0)
    tl.store(count + row, before)


@triton.jit(do_not_specialize=["limit", "length"])
def gathered_kernel(
    a: tl.tensor, a_tile: tl.tensor, a_step: tl.tensor, b: tl.tensor, index: tl.tensor, count: tl.tensor,
    length: tl.tensor, tail: tl.tensor, mean: tl.tensor, out: tl.tensor, limit: tl.tensor, d: tl.tensor,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:  # fmt: skip
    """One tile; those that read the same part of a are neighbours, and find it in the L2 cache."""
    column_tiles = tl.cdiv(d, COLUMNS)
    tile = (tl.program_id(0) // column_tiles).to(tl.int64)
    m = tl.arange(0, ROWS)
    first = tl.program_id(0) % column_tiles * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    if not EVEN:
        column = tl.minimum(column, d - 1)
    a += tile * a_tile
    index += tile * length
    last = tl.load(count + tile)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, last, DEPTH):
        at = start + tl.arange(0, DEPTH)
        there = at < last
        k = tl.load(index + at, mask=there, other=0).to(tl.int64)
        x = tl.load(a + k[None, :] * a_step + m[:, None], mask=there[None, :], other=0.0)
        y = tl.load(b + k[:, None] * d + column[None, :], mask=there[:, None], other=0.0)
        if WIDEN:  # Triton's interpreter multiplies the bits of bfloat16 as integers
            x, y = x.to(tl.float32), y.to(tl.float32)
        sums = tl.dot(x, y, sums, input_precision="ieee")
    row = tile * ROWS + m
    dropped = tl.load(tail + row, mask=row < tl.where(last < length, limit, 0), other=0.0)
    mean += tile * d
    for part in tl.static_range(4):  # all at once would not fit the registers
        column = first + part * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
        inside = (row < limit)[:, None] & (column < d)[None, :]
        to = out + row[:, None] * d + column[None, :]
        total = half_of(half_of(sums, part // 2), part % 2)
        total += dropped[:, None] * tl.load(mean + column, mask=column < d, other=0.0)[None, :]
        if ADD:
            total += tl.load(to, mask=inside, other=0.0)
        tl.store(to, total, mask=inside)
