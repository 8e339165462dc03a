"""Shapes of models whose kernels are compiled ahead of time."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Model:
    d: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    is_gemma: bool = False
    has_qk_norm: bool = False
    dtype: torch.dtype = torch.bfloat16


MODELS = {
    "gemma-2-2b": Model(2304, 9216, 8, 4, 256, is_gemma=True),
    "gemma-2-9b": Model(3584, 14336, 16, 8, 256, is_gemma=True),
    "llama-3-8b": Model(4096, 14336, 32, 8, 128),
    "qwen2.5-0.5b": Model(896, 4864, 14, 2, 64),
    "qwen3-8b": Model(4096, 12288, 32, 8, 128, has_qk_norm=True),
    "llama-3-8b float32": Model(4096, 14336, 32, 8, 128, dtype=torch.float32),
    "odd": Model(1001, 2731, 6, 2, 80, has_qk_norm=True),
    "widest": Model(16384, 53248, 128, 8, 128),
}
"""``odd``: rows that do not start at multiples of 16 bytes."""
