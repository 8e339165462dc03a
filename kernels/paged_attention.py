"""Attention of packed query windows over a paged KV cache."""

from typing import Literal

import torch
from torch import Tensor

from engine.kernels.flash_attention import PAGES_PER_RUN, FlashIndices, flash_attention, reason_against_flash
from engine.kernels.native import Impl, choose, is_native_index, is_native_layout, new_output
from engine.kernels.softcap import check_softcap
from engine.kernels.triton_choice import choose_triton

PAGE_SIZE = 32  # positions per page; kPage in csrc/kernels.h

TRITON_REQUIREMENT = (
    'caches of layout "nhd" in the dtype of q, contiguous, with heads of at most 256 columns and at most 64 to a KV head '
    "(32 in float32 with more than 128 columns), contiguous int32 indices, all on one device and of shapes that belong "
    "together, a positive scale, and no gradient"
)

FLASH_REQUIREMENT = (
    'flash_indices, caches of layout "nhd" in the dtype of q, contiguous, of whole runs of pages, with heads of a multiple of '
    "8 columns and at most 256, all on one device, a positive scale, and no gradient"
)

KVLayout = Literal["panels", "nhd"]
"""How a page lies in memory: ``panels`` is what the C++ kernels read, ``nhd`` what those on GPUs do."""


def kv_cache_shapes(
    pages: int, kv_heads: int, head_dim: int, layout: KVLayout = "panels"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one layer's K and V storage.

    ``nhd``: both are [pages, PAGE_SIZE, kv_heads, head_dim], as flash-attention has it. ``panels``: K is [pages, kv_heads,
    head_dim, PAGE_SIZE], so that scores are products with a page as it lies, and V [pages, kv_heads, PAGE_SIZE, head_dim
    rounded up to 16]. All must start as zeros, so that the padding never holds NaN.
    """
    if layout == "nhd":
        return (pages, PAGE_SIZE, kv_heads, head_dim), (pages, PAGE_SIZE, kv_heads, head_dim)
    return (pages, kv_heads, head_dim, PAGE_SIZE), (pages, kv_heads, PAGE_SIZE, -(-head_dim // 16) * 16)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    row_start: Tensor,
    first_position: Tensor,
    *,
    heads: int,
    scale: float,
    softcap: float | None = None,
    window: int = 0,
    longest: int | None = None,
    layout: KVLayout = "panels",
    flash: FlashIndices | None = None,
    impl: Impl | Literal["flash"] = "auto",
) -> Tensor:
    """Causal grouped-query attention of the packed rows of several sequences -> [t, heads * head_dim].

    q [t, >= heads * head_dim] (the leading columns are the queries, so a fused qkv can be passed as it is); sequence s
    owns rows row_start[s] .. row_start[s + 1] (int32 [s + 1]), at consecutive positions from first_position[s] (int32),
    and pages block_table[s] (int32 [s, max pages]); rows behind the last sequence's belong to none, and what comes out for
    them is undefined. Caches as ``kv_cache_shapes`` says. A query at position p sees keys in (p - window, p], all up to p
    where window is 0. Scores are capped as ``softcap * tanh(scores / softcap)``;
    None and 0.0 are no cap.

    ``longest``: about the most positions a sequence has, or will have where a captured graph is replayed; by default what
    block_table has room for. The GPU's kernels divide their work by it, nothing else depends on it. ``flash``: the same
    sequences for flash-attn, which with "auto" is taken where they say so (engine/kernels/flash_attention.py).

    With the C++ kernel a row's bits do not depend on the other rows; with Triton's not on other sequences, given all
    shapes and ``longest`` (engine/kernels/gpu/paged_attention.py says more).
    """
    check_softcap(softcap)
    tensors = (q, k_cache, v_cache, block_table, row_start, first_position)
    if _choose_flash(impl, *tensors, flash, heads, scale, layout):
        assert flash is not None
        most = block_table.shape[1] * PAGE_SIZE
        return flash_attention(q, k_cache, v_cache, row_start, flash, heads, scale, softcap, window, longest or most)
    assert impl != "flash"
    if choose_triton(impl, q, _fits_triton(*tensors, heads, scale, layout), TRITON_REQUIREMENT):
        from engine.kernels.gpu import paged_attention as gpu

        with torch.cuda.device_of(q):  # Triton launches on the current device
            return gpu.paged_attention(*tensors, heads, scale, softcap or None, window, longest)
    kv_heads, head_dim = _heads(k_cache, layout)
    indices = (block_table, row_start, first_position)
    supported = (
        layout == "panels"
        and is_native_layout(q, k_cache, v_cache)
        and is_native_index(torch.int32, *indices)
        and (k_cache.shape, v_cache.shape) == kv_cache_shapes(k_cache.shape[0], kv_heads, head_dim)
        and q.dim() == 2
        and q.shape[1] >= heads * head_dim
        and heads % kv_heads == 0
        and block_table.dim() == 2
        and row_start.shape == (block_table.shape[0] + 1,)
        and first_position.shape == block_table.shape[:1]
    )
    library = choose(impl, supported, "contiguous float32 inputs and int32 indices of shapes that belong together")
    if library is None:
        return _reference(
            q, k_cache, v_cache, block_table, row_start, first_position, heads, scale, softcap, window, layout
        )
    out = new_output(q.shape[0], heads * head_dim)
    library.module.attention(
        library.table, q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(), block_table.data_ptr(),
        row_start.data_ptr(), first_position.data_ptr(), block_table.shape[0], block_table.shape[1], q.shape[1], heads,
        kv_heads, head_dim, v_cache.shape[3], window, scale, softcap or 0.0, library.threads,
    )  # fmt: skip
    return out


def _reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, row_start: Tensor, first_position: Tensor,
    heads: int, scale: float, softcap: float | None, window: int, layout: KVLayout,
) -> Tensor:  # fmt: skip
    kv_heads, head_dim = _heads(k_cache, layout)
    out = q.new_empty(q.shape[0], heads * head_dim)
    bounds = row_start.tolist()
    for s, first in enumerate(first_position.tolist()):
        rows = slice(bounds[s], bounds[s + 1])
        count = bounds[s + 1] - bounds[s]
        if count == 0:
            continue
        length = first + count
        pages = block_table[s, : -(-length // PAGE_SIZE)].long()
        k, v = (cache[pages] for cache in (k_cache, v_cache))
        if layout == "nhd":
            k, v = k.permute(2, 3, 0, 1), v.permute(2, 0, 1, 3)
        else:
            k, v = k.permute(1, 2, 0, 3), v.permute(1, 0, 2, 3)
        k = k.flatten(2)[..., :length]  # [kv_heads, head_dim, length]
        v = v.flatten(1, 2)[:, :length, :head_dim]  # [kv_heads, length, head_dim]
        queries = q[rows, : heads * head_dim].view(count, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
        scores = (queries.float() @ k.float()[:, None]) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        query_position = torch.arange(first, length, device=q.device)[:, None]
        key_position = torch.arange(length, device=q.device)
        hidden = key_position > query_position
        if window:
            hidden |= key_position <= query_position - window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[rows] = _weighted_sum(weights, v.float(), first).permute(2, 0, 1, 3).reshape(count, -1).to(q.dtype)
    return out


def _choose_flash(
    impl: str, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, row_start: Tensor,
    first_position: Tensor, flash: FlashIndices | None, heads: int, scale: float, layout: KVLayout,
) -> bool:  # fmt: skip
    """Whether to call flash-attn: where it is asked for, and by default where ``flash`` says that it is faster."""
    sequences = block_table.shape[0]
    if impl != "flash" and (impl != "auto" or flash is None or q.shape[0] < flash.least_rows * sequences):
        return False
    reason = reason_against_flash(q)
    fits = (
        flash is not None
        and k_cache.shape[0] % PAGES_PER_RUN == 0
        and k_cache.shape[-1] % 8 == 0
        and flash.key_starts.shape == row_start.shape
        and flash.block_table.shape[0] == sequences
        and _fits_triton(q, k_cache, v_cache, block_table, row_start, first_position, heads, scale, layout)
    )
    if reason is None and not fits:
        reason = f"it needs {FLASH_REQUIREMENT}"
    if reason and impl == "flash":
        raise ValueError(f'impl="flash" cannot run here: {reason}; use impl="auto" or impl="torch"')
    return reason is None


def _fits_triton(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, row_start: Tensor, first_position: Tensor,
    heads: int, scale: float, layout: KVLayout,
) -> bool:  # fmt: skip
    """Whether the inputs are what TRITON_REQUIREMENT says."""
    if layout != "nhd" or k_cache.dim() != 4 or q.dim() != 2 or block_table.dim() != 2:
        return False
    kv_heads, head_dim = k_cache.shape[2:]
    indices, floats = (block_table, row_start, first_position), (q, k_cache, v_cache)
    return (
        k_cache.shape == v_cache.shape == kv_cache_shapes(k_cache.shape[0], kv_heads, head_dim, "nhd")[0]
        and 0 < head_dim <= 256
        and heads % kv_heads == 0
        and 0 < heads // kv_heads <= (32 if q.dtype is torch.float32 and head_dim > 128 else 64)  # lines of a tile
        and q.shape[1] >= heads * head_dim
        and q.stride(1) == 1
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(t.dtype is q.dtype and t.is_contiguous() for t in (k_cache, v_cache))
        and all(t.dtype is torch.int32 and t.is_contiguous() for t in indices)
        and all(t.device == q.device for t in (*floats, *indices))
        and row_start.shape == (block_table.shape[0] + 1,)
        and first_position.shape == block_table.shape[:1]
        and scale > 0
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in floats))
    )


def _heads(k_cache: Tensor, layout: KVLayout) -> tuple[int, int]:
    """KV heads and their size."""
    return k_cache.shape[1 + (layout == "nhd")], k_cache.shape[2 + (layout == "nhd")]


def _weighted_sum(weights: Tensor, v: Tensor, first: int) -> Tensor:
    """weights [kv_heads, group, count, length] over v [kv_heads, length, head_dim]; row i sees v up to first + i."""
    if v.isfinite().all():
        return weights @ v[:, None]
    # a weight of 0 would not keep out the NaN of a later position
    rows = [weights[:, :, i : i + 1, : first + i + 1] @ v[:, None, : first + i + 1] for i in range(weights.shape[2])]
    return torch.cat(rows, dim=2)
