"""Paged attention on GPUs: a program for every tile of query rows, KV head and part of the keys.

The lines of a tile are rows times the query heads of one KV head (row * group + head), so K and V are read once per
group. Where a launch has fewer tiles than the GPU takes at a time, several programs share the keys of each and a second
kernel combines their sums.

Nothing that the tensors hold decides on the host: programs are launched for the most tiles that so many rows could make,
and those without work end at once. So launches can be captured in a CUDA graph and replayed with other sequences.

What a row's bits depend on: its own sequence, and the shapes. Where keys are not divided, not even on the other rows of
its window, as long as all values are finite.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu.attention_plan import Plan, chip_of, plan
from engine.kernels.gpu.attention_tiles import attended, no_sums, sequence_of

LOG2_E = 1.4426950408889634
COMBINED = 8  # lines per program of the second kernel


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, row_start: Tensor, first_position: Tensor,
    heads: int, scale: float, softcap: float | None, window: int, longest: int | None, divided: Plan | None = None,
) -> Tensor:  # fmt: skip
    """As engine.kernels.paged_attention; ``divided``: how, if not as ``plan`` would."""
    t, sequences = q.shape[0], block_table.shape[0]
    _, page, kv_heads, head_dim = k_cache.shape
    out = q.new_empty(t, heads * head_dim)
    if t == 0 or sequences == 0:
        return out
    group, most = heads // kv_heads, block_table.shape[1] * page
    if divided is None:
        longest = min(most, longest or most)
        divided = plan(chip_of(q.device), q.dtype, head_dim, group, kv_heads, t, sequences, window, longest)
    splits, tile = divided.splits, divided.tiles
    shared = splits > 1
    parts = q.new_empty(splits, t, heads, head_dim, dtype=torch.float32) if shared else out
    sums = q.new_empty(2, splits, t, heads, dtype=torch.float32) if shared else None
    columns = max(16, triton.next_power_of_2(head_dim))
    attention_kernel[(divided.row_tiles, kv_heads, splits)](
        q, q.stride(0), k_cache, v_cache, block_table, block_table.stride(0), row_start, first_position, parts, sums, t,
        sequences, kv_heads, splits, window, scale / (softcap or scale), (softcap or scale) * LOG2_E, GROUP=group,
        HEAD_DIM=head_dim, PAGE=page, HAS_CAP=bool(softcap), HAS_WINDOW=window > 0, SHARED=shared,
        LINES=tile.lines, KEYS=tile.keys, COLUMNS=columns,
        WIDEN=q.is_cpu,  # Triton's interpreter multiplies the bits of bfloat16 as integers
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if shared:
        combine_kernel[(triton.cdiv(t * heads, COMBINED),)](
            parts, sums, out, row_start, t, sequences, heads, splits, HEAD_DIM=head_dim, COLUMNS=columns,
            MOST=triton.next_power_of_2(splits), LINES=COMBINED, PARTS=4, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["table_stride", "t", "sequences", "kv_heads", "splits", "window"])
def attention_kernel(
    q_rows: tl.tensor, q_stride: tl.tensor, k_cache: tl.tensor, v_cache: tl.tensor, block_table: tl.tensor,
    table_stride: tl.tensor, row_start: tl.tensor, first_position: tl.tensor, out: tl.tensor, sums: tl.tensor,
    t: tl.tensor, sequences: tl.tensor, kv_heads: tl.tensor, splits: tl.tensor, window: tl.tensor,
    score_scale: tl.tensor, exponent_scale: tl.tensor, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, SHARED: tl.constexpr, LINES: tl.constexpr, KEYS: tl.constexpr,
    COLUMNS: tl.constexpr, WIDEN: tl.constexpr,
) -> None:  # fmt: skip
    """``out`` and ``sums``: of this part of the keys where they are SHARED."""
    ROWS: tl.constexpr = LINES // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # a sequence's last rows have most keys: they start first
    kv_head, split = tl.program_id(1), tl.program_id(2)
    s = sequence_of(tile, row_start, sequences, ROWS)
    if s >= sequences:
        return
    begin, stop = tl.load(row_start + s), tl.load(row_start + s + 1)
    first_row = (tile - begin // ROWS - s) * ROWS
    count = tl.minimum(stop - begin - first_row, ROWS)
    if count <= 0:
        return
    position = tl.load(first_position + s) + first_row
    end = position + count

    line = tl.arange(0, LINES)
    row, heads = line // GROUP, kv_heads * GROUP
    q_head, q_row = kv_head * GROUP + line % GROUP, (begin + first_row + row).to(tl.int64)
    real = row < count
    to = q_row * heads + q_head

    lowest, highest = 0, tl.cdiv(end, KEYS)  # tiles of keys that some line sees
    if HAS_WINDOW:
        lowest = tl.maximum(position + 1 - window, 0) // KEYS
    if SHARED:
        share = tl.cdiv(highest - lowest, splits)
        lowest += split * share
        highest = tl.minimum(lowest + share, highest)
        part = split.to(tl.int64) * t * heads
        largest, total = sums + part, sums + tl.cast(splits, tl.int64) * t * heads + part
        out += part * HEAD_DIM
        if lowest >= highest:
            tl.store(largest + to, tl.full((LINES,), float("-inf"), tl.float32), mask=real)
            tl.store(total + to, tl.zeros((LINES,), tl.float32), mask=real)
            return

    column = tl.arange(0, COLUMNS)[None, :]
    inside = real[:, None] & (column < HEAD_DIM)
    q = tl.load(q_rows + (q_row * q_stride + q_head * HEAD_DIM)[:, None] + column, mask=inside, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    pages = block_table + s.to(tl.int64) * table_stride
    own, stride = position + row, kv_heads * HEAD_DIM
    k_cache += kv_head * HEAD_DIM
    v_cache += kv_head * HEAD_DIM
    acc, l, m = no_sums(LINES, COLUMNS)
    acc, l, m = attended(
        acc, l, m, lowest, highest, q, k_cache, v_cache, pages, own, end, stride, window, score_scale, exponent_scale,
        HEAD_DIM, PAGE, KEYS, HAS_CAP, HAS_WINDOW, False, WIDEN,
    )  # fmt: skip
    if tl.max((acc * 0.0 != 0.0).to(tl.int32)) > 0:
        # some value is not finite, perhaps behind a line that it must not reach: again, in tiles so small that this
        # takes no more registers than the above
        SMALL: tl.constexpr = 16
        acc, l, m = no_sums(LINES, COLUMNS)
        acc, l, m = attended(
            acc, l, m, lowest * (KEYS // SMALL), highest * (KEYS // SMALL), q, k_cache, v_cache, pages, own, end, stride,
            window, score_scale, exponent_scale, HEAD_DIM, PAGE, SMALL, HAS_CAP, HAS_WINDOW, True, WIDEN,
        )  # fmt: skip
    if SHARED:
        tl.store(largest + to, m * exponent_scale, mask=real)
        tl.store(total + to, l, mask=real)
    else:
        acc = acc / l[:, None]
    tl.store(out + (to * HEAD_DIM)[:, None] + column, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["t", "sequences", "heads", "splits"])
def combine_kernel(
    parts: tl.tensor, sums: tl.tensor, out: tl.tensor, row_start: tl.tensor, t: tl.tensor, sequences: tl.tensor,
    heads: tl.tensor, splits: tl.tensor, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, MOST: tl.constexpr,
    LINES: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """LINES heads of rows from their parts, each relative to its own largest score; empty parts were not written."""
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    real = line < tl.load(row_start + sequences).to(tl.int64) * heads
    apart = tl.cast(t, tl.int64) * heads  # from one part of a line to the next
    at, split = line[:, None], tl.arange(0, MOST)[None, :]
    there = real[:, None] & (split < splits)
    every_m = tl.load(sums + split * apart + at, mask=there, other=float("-inf"))
    every_l = tl.load(sums + (splits + split) * apart + at, mask=there, other=0.0)
    top = tl.max(every_m, 1)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(every_l * tl.exp2(every_m - base[:, None]), 1)
    column = tl.arange(0, COLUMNS)[None, :]
    acc = tl.zeros((LINES, COLUMNS), tl.float32)
    for start in range(0, splits, PARTS):
        for i in tl.static_range(PARTS):  # several loads under way at a time
            to = (start + i) * apart + line
            m = tl.load(sums + to, mask=real & (to < splits * apart), other=float("-inf"))
            written = (m > float("-inf"))[:, None] & (column < HEAD_DIM)
            x = tl.load(parts + to[:, None] * HEAD_DIM + column, mask=written, other=0.0)
            acc += x * tl.exp2(m - base)[:, None]
    acc = acc / total[:, None]
    inside = real[:, None] & (column < HEAD_DIM)
    tl.store(out + at * HEAD_DIM + column, acc.to(out.dtype.element_ty), mask=inside)
