"""The plan "sparse": 2 + 4 d units of matrix product, d the share of dLoss/dlogits that is multiplied.

Logits, losses and dLoss/dlogits, g, are those of the plan "dense". Of g, each row has a threshold below which lies at most
``filter_eps`` of its mass, the sum of |g|. In a block of rows, the hidden rows' gradients sum over the columns where any
row exceeds its threshold; in a block of columns, W's gradient sums over the rows that do. In both, entries below the
threshold that stand in a chosen row or column are included. What is left out comes back as a product of rank one
per block: its sums, times its mean row of W (or hidden row), weighted by mass: a direction that all rows of W share
would otherwise be missing in proportion to the mass. Labels always count. Blocks that keep more than ``DENSE_ABOVE``
keep everything.

A block of g is 128 x 128, so that one product kernel serves both gradients: it walks a list of indices and gathers whole
rows of two matrices, at least 256 consecutive bytes each. For that, g is also kept as panels of 128 rows in which a
column is contiguous, where the logits were. Smaller blocks would keep less and read more per product.

On 256 rows per stream of a model with V = 128256 and D = 1024 (a float32 model of this plan on a CPU; mean entropy
5.1 nats), ``filter_eps`` 0.1 multiplied 23% and 34% of g, 3.1 units, and every gradient was within 3e-3 of exact (1.5e-2
without the rank-one terms); 0.15 gave 2.7 units and 7e-3; 0.2 gave 2.5 and 1.5e-2. 0.1 is a sensible value. Nothing here has
been timed on a GPU.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.consistency_loss.problem import Needs, Outcome, Problem
from engine.kernels.consistency_loss.triton_dense import (
    BLOCK,
    PROGRAMS,
    WARPS,
    buffers,
    capacity,
    gradient_scale,
    losses_and_differences,
    unscaled,
)  # fmt: skip
from engine.kernels.consistency_loss.triton_dense import loss_and_gradients as dense
from engine.kernels.consistency_loss.triton_gather import Lists, add_gathered, listed, tiles
from engine.kernels.consistency_loss.triton_products import product
from engine.kernels.consistency_loss.triton_rows import Chunk, Results, chunks

DENSE_ABOVE = 0.75
"""Share of a block above which leaving out the rest gains too little to be worth its error (a choice, not measured)."""
BUCKETS = tl.constexpr(512)
BUCKET_SHIFT = tl.constexpr(22)
"""Buckets of |g| are its float32 exponent and first bit of mantissa."""
MARGIN = 1 - 2**-12
"""Of the bound, for the rounding of the sums it is compared with."""


@dataclass(frozen=True, slots=True)
class Density:
    """Shares of dLoss/dlogits that entered the products, float64 scalars on the device; NaN where there was none."""

    hidden: Tensor
    """In the hidden rows' gradients."""
    weight: Tensor
    """In W's gradient."""

    def units(self) -> float:
        """Units of matrix product of the whole pass; waits for the device."""
        return 2.0 + 2.0 * float(self.hidden) + 2.0 * float(self.weight)


def loss_and_gradients(p: Problem, needs: Needs) -> Outcome:
    """The loss's rows and the wanted gradients; see Problem and Outcome. Exact, by "dense", with ``filter_eps`` 0."""
    if p.filter_eps == 0.0 or not needs.gradients:
        return dense(p, needs)
    return with_density(p, needs)[0]


def with_density(p: Problem, needs: Needs) -> tuple[Outcome, Density]:
    """The same, and how much was multiplied."""
    results, dtype = Results(p, needs), p.weight.dtype
    parts = chunks(p, needs, capacity(p, needs))
    t = tiles(dtype)
    # with 64 rows or more of float32 there is room for panels of half their width
    rows = max((max(part.rows, 64) for part in parts), default=0)
    logits, differences = buffers(p, needs, rows, t.rows)
    work = Work(p, needs, logits, differences)
    for part in parts:
        work.add(part, results)
    grad_bias, density = unscaled(work.bias_sum, work.scale, dtype), work.density()
    weight_sum, scale = work.weight_sum, work.scale
    if weight_sum is not None and not work.rows:
        weight_sum.zero_()
    del logits, differences, work  # before the peak that the result's own copy of dW would make
    return results.outcome(unscaled(weight_sum, scale, dtype), grad_bias), density


def _panels(logits: Tensor, differences: Tensor, width: int) -> Tensor:
    """[blocks of ``width`` rows, v, width] in the dtype of the differences, in the logits' memory where it has room."""
    rows, v = logits.shape
    shape = (triton.cdiv(rows, width), v, width)
    if differences.dtype == torch.float32:  # the differences are there themselves
        return differences.new_empty(shape)
    memory = logits.as_strided((rows * logits.stride(0),), (1,)).view(differences.dtype)
    return memory[: shape[0] * v * width].view(shape)


class Work:
    """The buffers of a chunk, and what chunks add to."""

    def __init__(self, p: Problem, needs: Needs, logits: Tensor, differences: Tensor) -> None:
        self.p, self.needs, self.scale, self.tiles = p, needs, gradient_scale(p), tiles(p.weight.dtype)
        self.logits, self.differences = logits, differences
        self.panels = _panels(logits, differences, self.tiles.rows)
        v = p.weight.shape[0]
        self.weight_sum = (
            torch.empty(p.weight.shape, dtype=torch.float32, device=logits.device) if needs.weight else None
        )
        self.bias_sum = torch.zeros(v, dtype=torch.float32, device=logits.device) if needs.bias else None
        self.kept = torch.zeros(2, dtype=torch.float64, device=logits.device)
        self.rows = 0
        """Of dLoss/dlogits so far."""

    def add(self, part: Chunk, results: Results) -> None:
        p, needs = self.p, self.needs
        hidden = part.hidden(p)
        g = losses_and_differences(p, needs, part, hidden, results, self.logits, self.differences, self.scale)
        rows, width, wanted = g.shape[0], self.tiles.rows, part.rows_wanted(needs)
        if not rows:
            return
        labels = part.labels(p)[part.without_gradient :]
        panels = self.panels[: triton.cdiv(rows, width)] if wanted.stop > wanted.start else None
        of_rows, of_columns = divided(g, thresholds(g, p.filter_eps), labels, panels, needs.weight, width)
        if of_rows is not None and panels is not None:
            grad_hidden = torch.empty(rows, p.weight.shape[1], dtype=torch.float32, device=g.device)
            self._count(0, self._product(grad_hidden, panels, p.weight, of_rows, True), rows)
            results.write_hidden(part, wanted, grad_hidden[wanted], self.scale)
        if of_columns is not None and self.weight_sum is not None:
            tall = g.as_strided(
                (triton.cdiv(g.shape[1], width), rows, width), (width, g.stride(0), 1), g.storage_offset()
            )
            source = hidden[part.without_gradient :]
            self._count(1, self._product(self.weight_sum, tall, source, of_columns, not self.rows), g.shape[1])
        if self.bias_sum is not None:
            self.bias_sum += g.sum(0, dtype=torch.float32)
        self.rows += rows

    def _product(self, out: Tensor, a: Tensor, b: Tensor, side: "Side", first: bool) -> Lists:
        lists = listed(side.flags, DENSE_ABOVE)
        add_gathered(out, a, b, lists, self.tiles, side.left.sum(0), side.mean(b), first)
        return lists

    def _count(self, i: int, lists: Lists, size: int) -> None:
        """Entries multiplied, of ``size`` rows or columns in blocks."""
        blocks = torch.full_like(lists.count, self.tiles.rows, dtype=torch.float64)
        blocks[-1:] = size - (lists.count.numel() - 1) * self.tiles.rows
        self.kept[i] += lists.count.double().dot(blocks)

    def density(self) -> Density:
        entries = self.rows * self.p.weight.shape[0]
        return Density(self.kept[0] / entries, self.kept[1] / entries)


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two products: its blocks, of rows or of columns, and what each sums over."""

    flags: Tensor
    """[blocks, length] int8: what is multiplied."""
    mass: Tensor
    """[blocks, length] float32: sum of |g| of what is not, else 0."""
    left: Tensor
    """[blocks of the other side, rows or columns] float32: sums of the entries that are not multiplied."""

    def mean(self, source: Tensor) -> Tensor:
        """[blocks, d] float32: the mean of source [length, d] that belongs to what is not multiplied."""
        largest = self.mass.amax(1, keepdim=True)
        weights = torch.where(largest > 0, self.mass / largest, 0.0).to(source.dtype)
        return product(weights, source) / weights.sum(1, keepdim=True, dtype=torch.float32).clamp_min(1e-30)


def thresholds(g: Tensor, eps: float) -> Tensor:
    """[rows] float32: of each row of g the largest bucket's edge below which at most eps of its mass lies."""
    rows, v = g.shape
    splits = max(1, min(-(-PROGRAMS // max(1, rows)), triton.cdiv(v, BLOCK)))
    width = triton.cdiv(triton.cdiv(v, splits), BLOCK) * BLOCK
    splits = triton.cdiv(v, width)
    counts = torch.empty(rows, splits, BUCKETS.value, dtype=torch.int32, device=g.device)
    mass = torch.empty(rows, splits, dtype=torch.float32, device=g.device)
    found = torch.empty(rows, dtype=torch.float32, device=g.device)
    if rows:
        masses_kernel[(rows, splits)](g, g.stride(0), counts, mass, v, width, BLOCK=BLOCK, num_warps=WARPS)
        thresholds_kernel[(rows,)](counts, mass, found, splits, eps * MARGIN, num_warps=WARPS)
    return found


def divided(
    g: Tensor, threshold: Tensor, labels: Tensor, panels: Tensor | None, weight: bool, width: int
) -> tuple[Side | None, Side | None]:
    """What counts in blocks of rows (with panels, which it fills) and of columns (with ``weight``).

    g [rows, v], threshold [rows], labels of the first rows.
    """
    rows, v = g.shape
    row_blocks, column_blocks = triton.cdiv(rows, width), triton.cdiv(v, width)

    def side(blocks: int, length: int, others: int, size: int) -> Side:
        mass = threshold.new_empty(blocks, length)
        return Side(torch.empty_like(mass, dtype=torch.int8), mass, threshold.new_empty(others, size))

    of_rows = side(row_blocks, v, column_blocks, rows) if panels is not None else None
    of_columns = side(column_blocks, rows, row_blocks, v) if weight else None
    if rows:
        h, w = of_rows, of_columns
        divide_kernel[(column_blocks * row_blocks,)](
            g, g.stride(0), threshold, labels, labels.numel(), panels, h and h.flags, h and h.mass, h and h.left,
            w and w.flags, w and w.mass, w and w.left, rows, v, HIDDEN=h is not None, WEIGHT=w is not None,
            WIDTH=width, num_warps=16,
        )  # fmt: skip
    return of_rows, of_columns


@triton.jit(do_not_specialize=["width"])
def masses_kernel(
    g: tl.tensor, g_stride: tl.tensor, counts: tl.tensor, mass: tl.tensor, v: tl.tensor, width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Of one row over ``width`` columns: how many entries are in which bucket, and the sum of |g|."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g += row * g_stride
    start = split * width
    found = tl.zeros((BUCKETS,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    for offset in range(start, tl.minimum(start + width, v), BLOCK):
        columns = offset + tl.arange(0, BLOCK)
        size = tl.abs(tl.load(g + columns, mask=columns < v, other=0.0).to(tl.float32))
        found += tl.histogram(size.to(tl.int32, bitcast=True) >> BUCKET_SHIFT, BUCKETS)
        total += size
    at = row * tl.num_programs(1) + split
    tl.store(counts + at * BUCKETS + tl.arange(0, BUCKETS), found)
    tl.store(mass + at, tl.sum(total, 0))


@triton.jit(do_not_specialize=["splits"])
def thresholds_kernel(counts: tl.tensor, mass: tl.tensor, found: tl.tensor, splits: tl.tensor, eps: tl.tensor) -> None:
    """Entries are taken for as large as their bucket allows, so that the bound holds. NaN is below no threshold."""
    row = tl.program_id(0).to(tl.int64)
    bucket = tl.arange(0, BUCKETS)
    entries = tl.zeros((BUCKETS,), tl.int32)
    total = 0.0
    for split in range(splits):
        at = row * splits + split
        entries += tl.load(counts + at * BUCKETS + bucket)
        total += tl.load(mass + at)
    edge = ((bucket + 1) << BUCKET_SHIFT).to(tl.float32, bitcast=True)
    below = tl.cumsum(tl.where(entries > 0, entries.to(tl.float32) * edge, 0.0), 0)
    left_out = tl.minimum(tl.sum((below <= eps * total).to(tl.int32), 0), BUCKETS - 2)
    tl.store(found + row, (left_out << BUCKET_SHIFT).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["labelled", "rows"])
def divide_kernel(
    g: tl.tensor, g_stride: tl.tensor, threshold: tl.tensor, labels: tl.tensor, labelled: tl.tensor, panels: tl.tensor,
    column_flags: tl.tensor, column_mass: tl.tensor, row_left: tl.tensor, row_flags: tl.tensor, row_mass: tl.tensor,
    column_left: tl.tensor, rows: tl.tensor, v: tl.tensor, HIDDEN: tl.constexpr, WEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """One block of rows and of columns, of which either may be too many for a grid's second dimension."""
    column_blocks = tl.cdiv(v, WIDTH)
    row_block = (tl.program_id(0) // column_blocks).to(tl.int64)
    column_block = (tl.program_id(0) % column_blocks).to(tl.int64)
    row = row_block * WIDTH + tl.arange(0, WIDTH)
    column = column_block * WIDTH + tl.arange(0, WIDTH)
    row_there, column_there = row < rows, column < v
    stored = tl.load(
        g + row[:, None] * g_stride + column[None, :], mask=row_there[:, None] & column_there[None, :], other=0.0
    )
    x = stored.to(tl.float32)
    size = tl.abs(x)
    least = tl.load(threshold + row, mask=row_there, other=0.0)
    label = tl.load(labels + row, mask=row < labelled, other=-1)
    small = (size < least[:, None]) | (size == 0.0)
    counts = tl.where(small & (column[None, :] != label[:, None]), 0, 1)
    if HIDDEN:
        at = row_block * v + column
        flag = tl.max(counts, 0)
        tl.store(column_flags + at, flag.to(tl.int8), mask=column_there)
        tl.store(column_mass + at, tl.where(flag > 0, 0.0, tl.sum(size, 0)), mask=column_there)
        left = tl.sum(tl.where(flag[None, :] > 0, 0.0, x), 1)
        tl.store(row_left + column_block * rows + row, left, mask=row_there)
        to = panels + row_block * v * WIDTH + column[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(to, tl.trans(stored), mask=column_there[:, None])
    if WEIGHT:
        at = column_block * rows + row
        flag = tl.max(counts, 1)
        tl.store(row_flags + at, flag.to(tl.int8), mask=row_there)
        tl.store(row_mass + at, tl.where(flag > 0, 0.0, tl.sum(size, 1)), mask=row_there)
        left = tl.sum(tl.where(flag[:, None] > 0, 0.0, x), 0)
        tl.store(column_left + row_block * v + column, left, mask=column_there)
