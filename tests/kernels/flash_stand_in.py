"""Does what flash-attn's documentation says of flash_attn_varlen_func, and refuses what version 2 refuses."""

import torch
from torch import Tensor

from tests.kernels.references import attention


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float, block_table: Tensor,
) -> Tensor:  # fmt: skip
    """Queries are the last ones of their sequence: with ``causal``, row i of n sees keys up to length - n + i, with a window
    of (left, right) those from as many as ``left`` before that on."""
    if k.shape[1] % 256:
        raise RuntimeError("Paged KV cache block size must be divisible by 256")
    assert causal
    assert window_size[1] == (0 if window_size[0] >= 0 else -1)
    assert all(t.dtype is torch.int32 and t.is_contiguous() for t in (cu_seqlens_q, cu_seqlens_k, block_table))
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out = torch.full_like(q, float("nan"))
    for s in range(len(queries) - 1):
        rows, length = queries[s + 1] - queries[s], keys[s + 1] - keys[s]
        assert rows <= max_seqlen_q != 1
        assert length <= max_seqlen_k
        runs = block_table[s, : -(-length // k.shape[1])].long()
        mine = [cache[runs].flatten(0, 1)[:length].double() for cache in (k, v)]
        part = q[queries[s] : queries[s + 1]]
        if rows:
            sees = (length - rows, softmax_scale, softcap or None, window_size[0] + 1)
            out[queries[s] : queries[s + 1]] = attention(part.double(), *mine, *sees).to(q.dtype)
    return out
