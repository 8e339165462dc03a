"""flash-attn as an implementation of paged attention: where it is installed, and where it was measured to be faster.

flash-attn 2 reads pages of a multiple of 256 positions. Ours have 32, so those of a sequence must lie in runs of eight, side by
side: a cache that is made for it hands them out so (engine/kv_cache.py), at the price of up to 255 unused positions a sequence.
"""

import importlib
import importlib.util
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PAGES_PER_RUN = 8

FASTER_FROM: dict[tuple[int, int], int] = {}
"""Rows per sequence from which it takes less time than our kernel, by ten times the compute capability and columns of a head,
from ``python -m bench.gpu.run --stages kernels`` (variants "ours" and "flash-attn 2"). Empty: no chip was measured yet, so it
runs only where it is asked for."""


class FlashIndices(NamedTuple):
    """The sequences of a step as flash-attn has them, the same for every layer."""

    block_table: Tensor
    """[sequences, most runs] int32: run i is pages PAGES_PER_RUN * i and those behind it."""
    key_starts: Tensor
    """[sequences + 1] int32: where each one's keys would begin if they lay side by side."""
    least_rows: int
    """Per sequence, with which ``impl="auto"`` takes it."""


def flash_indices(block_table: Tensor, row_start: Tensor, first_position: Tensor, least_rows: int = 0) -> FlashIndices:
    """For the block table, row starts and first positions of ``paged_attention``, all pages in whole runs; asks the device
    for no values."""
    lengths = first_position + row_start.diff()
    runs = torch.div(block_table[:, ::PAGES_PER_RUN], PAGES_PER_RUN, rounding_mode="floor")
    return FlashIndices(runs, F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), least_rows)


def reason_against_flash(q: Tensor) -> str | None:
    """Why flash-attn cannot run on these queries."""
    if not q.is_cuda:
        return f"it needs tensors on a GPU, got {q.device}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, got {q.dtype}"
    return None if importlib.util.find_spec("flash_attn") else "flash-attn is not installed"


def rows_for_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> int | None:
    """Rows per sequence from which an engine on this device should take flash-attn; None: never, its pages need no runs.

    ``DIFFPO_ATTENTION`` forces ``flash`` or ``triton``; by default FASTER_FROM decides.
    """
    choice = os.environ.get("DIFFPO_ATTENTION") or "auto"
    if choice not in ("auto", "flash", "triton"):
        raise ValueError(f'DIFFPO_ATTENTION must be "auto", "flash" or "triton", got {choice!r}')
    reason = reason_against_flash(torch.empty(0, dtype=dtype, device=device)) if choice != "triton" else "unwanted"
    if choice == "flash":
        if reason is None and head_dim % 8:
            reason = f"it needs heads of a multiple of 8 columns, got {head_dim}"
        if reason:
            raise ValueError(f"DIFFPO_ATTENTION=flash cannot be used here: {reason}")
        return 0
    if reason or not FASTER_FROM:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return FASTER_FROM.get((10 * major + minor, head_dim))


def flash_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, row_start: Tensor, indices: FlashIndices, heads: int, scale: float,
    softcap: float | None, window: int, longest: int,
) -> Tensor:  # fmt: skip
    """As engine.kernels.paged_attention, with caches of layout "nhd" whose pages are a multiple of PAGES_PER_RUN. Unlike with
    our kernels, NaN in a guess's value can reach the rows before it: 0 * NaN."""
    t, (pages, page, kv_heads, head_dim) = q.shape[0], k_cache.shape
    runs = (pages // PAGES_PER_RUN, PAGES_PER_RUN * page, kv_heads, head_dim)
    out: Tensor = importlib.import_module("flash_attn").flash_attn_varlen_func(
        q[:, : heads * head_dim].unflatten(1, (heads, head_dim)), k_cache.view(runs), v_cache.view(runs),
        cu_seqlens_q=row_start, cu_seqlens_k=indices.key_starts,
        max_seqlen_q=max(2, t),  # with 1 it would take every sequence to have a row
        max_seqlen_k=longest, softmax_scale=scale, causal=True, window_size=(window - 1, 0) if window else (-1, -1),
        softcap=softcap or 0.0, block_table=indices.block_table,
    )  # fmt: skip
    return out.reshape(t, heads * head_dim)
