"""Rotary position embedding of queries and keys, and the write of keys and values into their pages, on a GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 8
"""Per program. With two warps and heads of 128 columns, a thread has one 16-byte load of each half of a head in two bytes
a value; fewer heads would read the rotation's float32 row, 1/4 of a head pair's bytes, more often."""


def rope_kv_write(
    qkv: Tensor, rotation: Tensor, positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor, head_dim: int,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
) -> None:  # fmt: skip
    """As engine.kernels.rope_kv_write with "nhd" pages; float32 inside, rounded once. A row's bits do not depend on the
    other rows."""
    rows, kv_heads = qkv.shape[0], k_cache.shape[2]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    blocks = triton.cdiv(heads, HEADS) + triton.cdiv(kv_heads, HEADS)
    if rows and blocks:
        half = triton.next_power_of_2(head_dim // 2)
        rope_kv_write_kernel[(rows, blocks)](
            qkv, rotation, positions, slots, k_cache, v_cache, q_norm, k_norm, heads, kv_heads, eps,
            HAS_Q_NORM=q_norm is not None, HAS_K_NORM=k_norm is not None, HEAD_DIM=head_dim, HALF=half, HEADS=HEADS,
            num_warps=warps(half, qkv.dtype),
        )  # fmt: skip


def warps(half: int, dtype: torch.dtype) -> int:
    """Such that a thread has 16 bytes of each half."""
    return max(1, min(8, HEADS * half * dtype.itemsize // 512))


@triton.jit
def rotate(
    at: tl.tensor, mask: tl.tensor, cos: tl.tensor, sin: tl.tensor, norm: tl.tensor, column: tl.tensor, eps: tl.tensor,
    HAS_NORM: tl.constexpr, HEAD_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """In place: heads of which ``at`` [HEADS, HALF] is the lower half, after their norm. Both halves as stored."""
    low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(at + HEAD_DIM // 2, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = 1.0 / tl.sqrt_rn(tl.sum(low * low + high * high, 1) / HEAD_DIM + eps)
        inside = column < HEAD_DIM // 2
        weight_low = tl.load(norm + column, mask=inside, other=0.0)
        weight_high = tl.load(norm + HEAD_DIM // 2 + column, mask=inside, other=0.0)
        low, high = low * scale[:, None] * weight_low[None, :], high * scale[:, None] * weight_high[None, :]
    c, s = cos[None, :], sin[None, :]
    new_low = (low * c - high * s).to(at.dtype.element_ty)
    new_high = (high * c + low * s).to(at.dtype.element_ty)
    tl.store(at, new_low, mask=mask)
    tl.store(at + HEAD_DIM // 2, new_high, mask=mask)
    return new_low, new_high


@triton.jit
def store_heads(
    cache: tl.tensor, offset: tl.tensor, low: tl.tensor, high: tl.tensor, mask: tl.tensor, HEAD_DIM: tl.constexpr
) -> None:
    tl.store(cache + offset, low.to(cache.dtype.element_ty), mask=mask)
    tl.store(cache + offset + HEAD_DIM // 2, high.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def rope_kv_write_kernel(
    qkv: tl.tensor, rotation: tl.tensor, positions: tl.tensor, slots: tl.tensor, k_cache: tl.tensor,
    v_cache: tl.tensor, q_norm: tl.tensor, k_norm: tl.tensor, heads: tl.tensor, kv_heads: tl.tensor, eps: tl.tensor,
    HAS_Q_NORM: tl.constexpr, HAS_K_NORM: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:  # fmt: skip
    """Some heads of a row: queries, or keys with their values."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, HALF)
    inside = column < HEAD_DIM // 2
    angle = rotation + tl.load(positions + row) * HEAD_DIM + column
    cos = tl.load(angle, mask=inside, other=0.0)
    sin = tl.load(angle + HEAD_DIM // 2, mask=inside, other=0.0)
    qkv += row * (heads + 2 * kv_heads) * HEAD_DIM
    query_blocks = tl.cdiv(heads, HEADS)
    if block < query_blocks:
        head = block * HEADS + tl.arange(0, HEADS)
        mask = (head < heads)[:, None] & inside[None, :]
        at = qkv + head[:, None] * HEAD_DIM + column[None, :]
        rotate(at, mask, cos, sin, q_norm, column, eps, HAS_Q_NORM, HEAD_DIM)
    else:
        head = (block - query_blocks) * HEADS + tl.arange(0, HEADS)
        mask = (head < kv_heads)[:, None] & inside[None, :]
        offset = head[:, None] * HEAD_DIM + column[None, :]
        k_at = qkv + heads * HEAD_DIM + offset
        v_at = k_at + kv_heads * HEAD_DIM
        v_low = tl.load(v_at, mask=mask, other=0.0)
        v_high = tl.load(v_at + HEAD_DIM // 2, mask=mask, other=0.0)
        k_low, k_high = rotate(k_at, mask, cos, sin, k_norm, column, eps, HAS_K_NORM, HEAD_DIM)
        slot = tl.load(slots + row)
        if slot >= 0:
            # pages lie one behind the other, so a slot counts positions through all of them
            to = slot * kv_heads * HEAD_DIM + offset
            store_heads(k_cache, to, k_low, k_high, mask, HEAD_DIM)
            store_heads(v_cache, to, v_low, v_high, mask, HEAD_DIM)
