"""Rotation and storage of one layer's keys and values."""

import torch

from engine.kernels import kv_cache_shapes
from engine.kernels.gpu import rope_kv_write
from tests.kernels.ahead_of_time.compiling import Launch, meta, recording
from tests.kernels.ahead_of_time.models import MODELS

MODULES = (rope_kv_write,)
SHAPES = MODELS


def multiplies(kernel: str, shape: str) -> bool:
    return False


def launches(shape: str) -> list[Launch]:
    m, rows = MODELS[shape], 64
    norm = meta(m.head_dim) if m.has_qk_norm else None
    cache = meta(*kv_cache_shapes(1 << 14, m.kv_heads, m.head_dim, "nhd")[0], dtype=m.dtype)
    qkv, index = meta(rows, (m.heads + 2 * m.kv_heads) * m.head_dim, dtype=m.dtype), meta(rows, dtype=torch.int64)
    with recording(*MODULES) as found:
        rope_kv_write.rope_kv_write(
            qkv, meta(8192, m.head_dim), index, index, cache, cache, m.head_dim, norm, norm, 1e-6
        )
    return found
