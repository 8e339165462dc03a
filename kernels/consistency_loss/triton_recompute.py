"""The plan "recompute": least memory, eight units of matrix product, no logits held.

The projection is inside the kernels. The first pass gives every row's sums, both streams under the same tiles of W. The
second goes through the vocabulary in blocks: differences of a block, from recomputed logits, then two products that give
W's gradient there, written once in its own dtype, and its share of the hidden rows' gradients. Every element has one
writer, so results repeat to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.consistency_loss import triton_dense
from engine.kernels.consistency_loss.problem import Needs, Outcome, Problem
from engine.kernels.consistency_loss.triton_math import FIELDS, capped, combined, finite, half_of, moved, store_sums
from engine.kernels.consistency_loss.triton_products import Tiles, accumulate, product
from engine.kernels.consistency_loss.triton_rows import Chunk, Results, chunks

GROUP = 32
"""Tiles of rows that are worked on together: their hidden rows stay in the L2 cache while W streams by."""
PROGRAMS = 2048
MAX_SPLITS = 64
BLOCK_BYTES = 1 << 28
"""Of the second pass's buffers."""
PARTS = tl.constexpr(8)


def tiles(dtype: torch.dtype) -> Tiles:
    """Float32 products run without tensor cores, where larger tiles would not fit the registers."""
    return Tiles(64, 64, 32, 4, 2) if dtype == torch.float32 else Tiles(128, 128, 64, 8, 3)


def loss_and_gradients(p: Problem, needs: Needs) -> Outcome:
    """The loss's rows and the wanted gradients; see Problem and Outcome."""
    if not needs.weight:
        # without the float32 dW, small chunks of "dense" take less memory than this, and half the products
        return triton_dense.loss_and_gradients(p, needs)
    results = Results(p, needs)
    grad_weight = torch.zeros_like(p.weight)
    grad_bias = torch.zeros(p.weight.shape[0], dtype=torch.float32, device=p.weight.device) if needs.bias else None
    scale = triton_dense.gradient_scale(p)
    for part in chunks(p, needs, 1 << 62):  # one
        _all_rows(p, needs, part, results, grad_weight, grad_bias, scale)
    return results.outcome(grad_weight, triton_dense.unscaled(grad_bias, scale, p.weight.dtype))


def _all_rows(
    p: Problem, needs: Needs, part: Chunk, results: Results, grad_weight: Tensor, grad_bias: Tensor | None,
    scale: Tensor | None,
) -> None:  # fmt: skip
    hidden, quiet = part.hidden(p), part.without_gradient
    v, d = p.weight.shape
    wanted, labels = part.rows_wanted(needs), part.labels(p)
    sums = row_sums(p, hidden, labels, needs.stats)
    divergence = torch.zeros(part.drafts.numel(), dtype=torch.float32, device=hidden.device)
    row_scale = part.scale(p) if scale is None else part.scale(p) * scale
    grad_hidden = hidden.new_empty(wanted.stop - wanted.start, d, dtype=torch.float32)
    width = min(block_width(p, part), v)
    g = hidden.new_empty(part.rows - quiet, -(-width // 8) * 8)
    log_p = hidden.new_empty(part.heads, width, dtype=torch.float32)
    for start in range(0, v, width):
        block = slice(start, min(v, start + width))
        here = g[:, : block.stop - start]
        divergence += _differences(p, part, hidden, labels, sums, row_scale, here, log_p, block)
        weight_block = product(here.T, hidden[quiet:])
        grad_weight[block] = weight_block if scale is None else weight_block.div_(scale)
        if grad_hidden.numel():
            accumulate(grad_hidden, here[wanted], p.weight[block], start == 0)
        if grad_bias is not None:
            grad_bias[block] = here.sum(0, dtype=torch.float32)
    results.write_losses(part, sums, divergence)
    results.write_hidden(part, wanted, grad_hidden, scale)


def block_width(p: Problem, part: Chunk) -> int:
    """Columns of the second pass's blocks, a multiple of 1024."""
    column = part.rows * p.weight.element_size() + part.heads * 4
    return max(1, BLOCK_BYTES // max(1, column * 1024)) * 1024


def row_sums(p: Problem, hidden: Tensor, labels: Tensor, stats: bool) -> Tensor:
    """hidden [rows, d], labels of the first rows -> sums as ``combined`` returns them."""
    (rows, d), v, t = hidden.shape, p.weight.shape[0], tiles(hidden.dtype)
    row_tiles = triton.cdiv(rows, t.rows)
    splits = max(1, min(MAX_SPLITS, -(-PROGRAMS // max(1, row_tiles)), triton.cdiv(v, t.columns)))
    width = triton.cdiv(triton.cdiv(v, splits), t.columns) * t.columns
    splits = triton.cdiv(v, width)
    partial = torch.empty(FIELDS, rows, splits, dtype=torch.float32, device=hidden.device)
    if rows:
        project_sums_kernel[(row_tiles * splits,)](
            hidden, p.weight, p.bias, labels, labels.numel(), partial, rows, v, d, width, splits, p.softcap or 1.0,
            1.0 / p.temperature, HAS_BIAS=p.bias is not None, HAS_CAP=bool(p.softcap),
            HAS_TAU=p.temperature != 1.0, STATS=stats, **_constants(t, hidden), num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return combined(partial, p.temperature, stats)


def _constants(t: Tiles, hidden: Tensor) -> dict[str, int | bool]:
    return {
        "ROWS": t.rows, "COLUMNS": t.columns, "DEPTH": t.depth, "EVEN": hidden.shape[1] % t.depth == 0, "GROUP": GROUP,
        "WIDEN": hidden.is_cpu,  # Triton's interpreter multiplies the bits of bfloat16 as integers
    }  # fmt: skip


def _differences(
    p: Problem, part: Chunk, hidden: Tensor, labels: Tensor, sums: Tensor, scale: Tensor, g: Tensor, log_p: Tensor,
    block: slice,
) -> Tensor:  # fmt: skip
    """Fills g [rows with a gradient, columns of the block]; returns the drafts' divergence over these columns."""
    t, d, quiet = tiles(hidden.dtype), hidden.shape[1], part.without_gradient
    column_tiles = triton.cdiv(block.stop - block.start, t.columns)
    divergence = hidden.new_empty(part.drafts.numel(), column_tiles, dtype=torch.float32)
    for first, last in ((0, part.heads), (part.heads, part.rows)):
        row_tiles = triton.cdiv(last - first, t.rows)
        if row_tiles:
            project_differences_kernel[(row_tiles * column_tiles,)](
                hidden, p.weight, p.bias, labels, part.teacher, sums, scale, log_p, log_p.stride(0), g, g.stride(0),
                divergence, part.rows, first, last, quiet, block.start, block.stop, d, column_tiles, p.softcap or 1.0,
                1.0 / p.temperature, DRAFT=first > 0, HAS_BIAS=p.bias is not None, HAS_CAP=bool(p.softcap),
                HAS_TAU=p.temperature != 1.0, **_constants(t, hidden), num_warps=t.warps, num_stages=t.stages,
            )  # fmt: skip
    return divergence.sum(1)


@triton.jit
def tile_of(
    program: tl.tensor, row_tiles: tl.tensor, column_tiles: tl.tensor, GROUP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Programs in the order: rows within a group of GROUP tiles, columns, groups."""
    group = program // (GROUP * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = program - group * GROUP * column_tiles
    return group * GROUP + within % height, within // height


@triton.jit
def projected(
    hidden: tl.tensor, weight: tl.tensor, rows: tl.tensor, columns: tl.tensor, d: tl.tensor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The product [ROWS, COLUMNS] of existing rows and columns in float32."""
    k = tl.arange(0, DEPTH)
    x_at = hidden + rows.to(tl.int64)[:, None] * d + k[None, :]
    w_at = weight + columns.to(tl.int64)[None, :] * d + k[:, None]
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, d, DEPTH):
        if EVEN:
            x, w = tl.load(x_at + start), tl.load(w_at + start)
        else:
            x = tl.load(x_at + start, mask=k[None, :] < d - start, other=0.0)
            w = tl.load(w_at + start, mask=k[:, None] < d - start, other=0.0)
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        z = tl.dot(x, w, z, input_precision="ieee")
    return z


@triton.jit
def logits_of(
    z: tl.tensor, bias: tl.tensor, columns: tl.tensor, cap: tl.tensor,
    PART: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """One of PARTS parts of a product's columns: soft-capped logits and the soft-cap's derivative.

    What follows a product needs several values per logit: all of a tile at once would not fit the registers.
    """
    z = half_of(half_of(half_of(z, PART // 4), PART // 2 % 2), PART % 2)
    if HAS_BIAS:
        z += tl.load(bias + columns).to(tl.float32)[None, :]
    return capped(z, cap, HAS_CAP)


@triton.jit(do_not_specialize=["labelled", "rows", "width", "splits"])
def project_sums_kernel(
    hidden: tl.tensor, weight: tl.tensor, bias: tl.tensor, labels: tl.tensor, labelled: tl.tensor, partial: tl.tensor,
    rows: tl.tensor, v: tl.tensor, d: tl.tensor, width: tl.tensor, splits: tl.tensor, cap: tl.tensor,
    inv_tau: tl.tensor, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_TAU: tl.constexpr, STATS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """A tile of rows, target and draft alike, over ``width`` columns."""
    tile, split = tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), splits, GROUP)
    row = tile * ROWS + tl.arange(0, ROWS)
    present = row < rows
    label = tl.load(labels + row, mask=row < labelled, other=-1)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    lt, a, best, label_logit = l, l, l, l
    for offset in range(split * width, tl.minimum(split * width + width, v), COLUMNS):
        columns = tl.minimum(offset + tl.arange(0, COLUMNS), v - 1)
        tile_z = projected(hidden, weight, tl.minimum(row, rows - 1), columns, d, ROWS, COLUMNS, DEPTH, EVEN, WIDEN)
        for part in tl.static_range(PARTS):
            at = offset + part * (COLUMNS // PARTS) + tl.arange(0, COLUMNS // PARTS)
            z, _ = logits_of(tile_z, bias, tl.minimum(at, v - 1), cap, part, HAS_BIAS, HAS_CAP)
            z = tl.where((at < v)[None, :], z, float("-inf"))
            highest = tl.max(z, 1)
            top = tl.maximum(m, highest)
            base = finite(top)
            l, lt, a = moved(m, l, lt, a, base, inv_tau, HAS_TAU, STATS)
            label_logit += tl.sum(tl.where(at[None, :] == label[:, None], z, 0.0), 1)
            if STATS:
                lowest = tl.min(tl.where(z == highest[:, None], at.to(tl.float32)[None, :], float("inf")), 1)
                best = tl.where(highest > m, lowest, best)
            z -= base[:, None]
            e = tl.exp(z)
            l += tl.sum(e, 1)
            if HAS_TAU:
                lt += tl.sum(tl.exp(z * inv_tau), 1)
            if STATS:
                a += tl.sum(tl.where(e == 0.0, 0.0, e * z), 1)
            m = top
    to = partial + row.to(tl.int64) * splits + split
    store_sums(to, rows.to(tl.int64) * splits, present, m, l, lt, a, label_logit, best, HAS_TAU, STATS)


@triton.jit(do_not_specialize=["rows", "first", "last", "quiet", "begin", "end", "column_tiles"])
def project_differences_kernel(
    hidden: tl.tensor, weight: tl.tensor, bias: tl.tensor, labels: tl.tensor, teacher: tl.tensor, sums: tl.tensor,
    scale: tl.tensor, log_p: tl.tensor, log_p_stride: tl.tensor, g: tl.tensor, g_stride: tl.tensor,
    divergence: tl.tensor, rows: tl.tensor, first: tl.tensor, last: tl.tensor, quiet: tl.tensor, begin: tl.tensor,
    end: tl.tensor, d: tl.tensor, column_tiles: tl.tensor, cap: tl.tensor, inv_tau: tl.tensor,
    DRAFT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_TAU: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """A tile of rows ``first`` .. ``last`` and columns ``begin`` .. ``end``; targets leave log p for their drafts."""
    tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(last - first, ROWS), column_tiles, GROUP)
    row = first + tile * ROWS + tl.arange(0, ROWS)
    present, row = row < last, tl.minimum(row, last - 1)
    columns = tl.minimum(begin + column_tile * COLUMNS + tl.arange(0, COLUMNS), end - 1)
    z = projected(hidden, weight, row, columns, d, ROWS, COLUMNS, DEPTH, EVEN, WIDEN)
    stride = tl.cast(rows, tl.int64)
    maximum, log_total = tl.load(sums + row), tl.load(sums + stride + row)
    log_total_tau = log_total
    if HAS_TAU:
        log_total_tau = tl.load(sums + 2 * stride + row)
    own = tl.load(scale + row)[:, None]
    to = g + (row - quiet).to(tl.int64)[:, None] * g_stride
    total = tl.zeros((ROWS,), tl.float32)
    if DRAFT:
        label = row
        log_p += tl.load(teacher + row - first)[:, None] * log_p_stride
    else:
        label = tl.load(labels + row)
        log_p += row.to(tl.int64)[:, None] * log_p_stride
    for part in tl.static_range(PARTS):
        column = column_tile * COLUMNS + part * (COLUMNS // PARTS) + tl.arange(0, COLUMNS // PARTS)
        s, slope = logits_of(z, bias, begin + tl.minimum(column, end - begin - 1), cap, part, HAS_BIAS, HAS_CAP)
        within = column[None, :]
        inside = (within < end - begin) & present[:, None]
        exponent = s - maximum[:, None]
        log_q = exponent - log_total_tau[:, None]
        if HAS_TAU:
            log_q = exponent * inv_tau - log_total_tau[:, None]
        if DRAFT:
            log_teacher = tl.load(log_p + within, mask=inside, other=0.0)
            p = tl.exp(log_teacher)
            difference = tl.exp(log_q) - p
            # see differences_kernel of the plan "dense"
            terms = tl.where(p > 0.0, p * (log_teacher - log_q), 0.0) + difference
            total += tl.sum(tl.where(inside, terms, 0.0), 1)
        else:
            tl.store(log_p + within, log_q, mask=inside)
            difference = tl.exp(exponent - log_total[:, None]) - tl.where(begin + within == label[:, None], 1.0, 0.0)
        difference = tl.where(own == 0.0, 0.0, own * slope * difference)
        tl.store(to + within, difference.to(g.dtype.element_ty), mask=inside & (row >= quiet)[:, None])
    if DRAFT:
        tl.store(divergence + (row - first).to(tl.int64) * column_tiles + column_tile, total, mask=present)
