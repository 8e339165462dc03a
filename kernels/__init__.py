"""Operations on tensors for language-model refinement; they know nothing of models, requests or the engine.

Every operation has a plain PyTorch reference (``impl="torch"``) and faster implementations behind the same function;
``impl="auto"`` picks by device and layout. Nothing happens at import: the C++ library is loaded at the first call.
"""

from engine.kernels.gated_activation import gated_activation
from engine.kernels.linear import LinearWeight, embedding, linear
from engine.kernels.linear_argmax import linear_argmax
from engine.kernels.native import native_name
from engine.kernels.paged_attention import PAGE_SIZE, kv_cache_shapes, paged_attention
from engine.kernels.rms_norm import rms_norm
from engine.kernels.rope_kv_write import kv_write, rope_kv_write

__all__ = [
    "PAGE_SIZE",
    "LinearWeight",
    "embedding",
    "gated_activation",
    "kv_cache_shapes",
    "kv_write",
    "linear",
    "linear_argmax",
    "native_name",
    "paged_attention",
    "rms_norm",
    "rope_kv_write",
]
