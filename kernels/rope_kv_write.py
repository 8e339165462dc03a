"""Rotary position embedding of queries and keys, and the write of keys and values into their pages."""

import torch
from torch import Tensor

from engine.kernels.native import Impl, address, choose, is_native_index, is_native_layout
from engine.kernels.paged_attention import PAGE_SIZE, KVLayout, kv_cache_shapes
from engine.kernels.rms_norm import rms_norm
from engine.kernels.triton_choice import choose_triton, is_triton_layout

TRITON_INPUTS = (
    'contiguous tensors on one device, of shapes that belong together, without gradients: layout="nhd", caches of one '
    "dtype, float32 rotation and norms, int64 positions and slots, an even head_dim"
)


def rope_kv_write(
    qkv: Tensor,
    rotation: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    head_dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    layout: KVLayout = "panels",
    impl: Impl = "auto",
) -> None:
    """Rotates q and k of ``qkv`` in place (after their per-head RMS norm, if any) and stores k and v.

    qkv [t, (heads + 2 * kv_heads) * head_dim]; rotation [max positions, head_dim] = cos of head_dim / 2 angles, then
    sin; positions, slots [t] int64 (slot = page * PAGE_SIZE + offset; a row of slot -1 is not stored); caches as
    ``kv_cache_shapes`` says.
    """
    kv_heads = k_cache.shape[2 if layout == "nhd" else 1]
    fits = _shapes_fit(qkv, rotation, positions, slots, k_cache, v_cache, head_dim, q_norm, k_norm, layout)
    tensors = (qkv, rotation, positions, slots, k_cache, v_cache, q_norm, k_norm)
    triton_fits = fits and layout == "nhd" and _triton_types_fit(*tensors) and is_triton_layout(*tensors)
    if choose_triton(impl, qkv, triton_fits, TRITON_INPUTS):
        from engine.kernels.gpu import rope_kv_write as gpu

        with torch.cuda.device_of(qkv):  # Triton launches on the current device
            gpu.rope_kv_write(qkv, rotation, positions, slots, k_cache, v_cache, head_dim, q_norm, k_norm, eps)
        return
    supported = (
        fits
        and layout == "panels"
        and is_native_layout(qkv, rotation, k_cache, v_cache, q_norm, k_norm)
        and is_native_index(torch.int64, positions, slots)
    )
    library = choose(impl, supported, "contiguous float32 inputs and int64 indices of shapes that belong together")
    if library is None:
        _reference(qkv, rotation, positions, slots, k_cache, v_cache, head_dim, q_norm, k_norm, eps, layout)
        return
    library.module.rope_kv_write(
        library.table, qkv.data_ptr(), rotation.data_ptr(), address(q_norm), address(k_norm), k_cache.data_ptr(),
        v_cache.data_ptr(), positions.data_ptr(), slots.data_ptr(), qkv.shape[0],
        qkv.shape[1] // head_dim - 2 * kv_heads, kv_heads, head_dim, v_cache.shape[3], eps, library.threads,
    )  # fmt: skip


def _shapes_fit(
    qkv: Tensor, rotation: Tensor, positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor, head_dim: int,
    q_norm: Tensor | None, k_norm: Tensor | None, layout: KVLayout,
) -> bool:  # fmt: skip
    kv_heads = k_cache.shape[2 if layout == "nhd" else 1]
    return (
        (k_cache.shape, v_cache.shape) == kv_cache_shapes(k_cache.shape[0], kv_heads, head_dim, layout)
        and qkv.dim() == 2
        and qkv.shape[1] % head_dim == 0
        and qkv.shape[1] >= 2 * kv_heads * head_dim
        and rotation.shape[1:] == (head_dim,)
        and positions.shape == slots.shape == qkv.shape[:1]
        and all(norm is None or norm.shape == (head_dim,) for norm in (q_norm, k_norm))
    )


def _triton_types_fit(
    qkv: Tensor, rotation: Tensor, positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None,
) -> bool:  # fmt: skip
    return (
        rotation.shape[1] % 2 == 0
        and k_cache.dtype is v_cache.dtype
        and k_cache.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and positions.dtype is slots.dtype is torch.int64
        and all(t is None or t.dtype is torch.float32 for t in (rotation, q_norm, k_norm))
    )


def kv_write(
    k: Tensor, v: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor, layout: KVLayout = "panels"
) -> None:
    """Stores k, v [t, kv_heads, head_dim] at ``slots`` [t] int64, all >= 0."""
    page, offset = slots // PAGE_SIZE, slots % PAGE_SIZE
    if layout == "nhd":
        k_cache[page, offset], v_cache[page, offset] = k.to(k_cache.dtype), v.to(v_cache.dtype)
        return
    k_cache[page, :, :, offset] = k.to(k_cache.dtype)
    v_cache[page, :, offset, : v.shape[2]] = v.to(v_cache.dtype)


def _reference(
    qkv: Tensor, rotation: Tensor, positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor,
    head_dim: int, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, layout: KVLayout,
) -> None:  # fmt: skip
    kv_heads = k_cache.shape[2 if layout == "nhd" else 1]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q, k, v = qkv.view(qkv.shape[0], heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = rotation[positions].to(qkv.dtype)[:, None].chunk(2, dim=-1)
    for part, norm in ((q, q_norm), (k, k_norm)):
        x = part if norm is None else rms_norm(part.reshape(-1, head_dim), norm, eps, impl="torch").view_as(part)
        low, high = x.chunk(2, dim=-1)
        part.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1))
    stored = slots >= 0
    kv_write(k[stored], v[stored], slots[stored], k_cache, v_cache, layout)
