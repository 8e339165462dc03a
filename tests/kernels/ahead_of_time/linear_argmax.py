"""Projection and argmax, at row counts of every tile."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.gpu import linear_argmax
from tests.kernels.ahead_of_time.compiling import Launch, meta, recording

MODULES = (linear_argmax,)
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Shape:
    """What kernels are specialised to; ``extras``: bias, and rows counted on the device."""

    rows: int
    d: int
    v: int
    softcap: float | None
    dtype: torch.dtype
    extras: bool

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states, weight and bias."""
        bias = meta(self.v, dtype=self.dtype) if self.extras else None
        return meta(self.rows, self.d, dtype=self.dtype), meta(self.v, self.d, dtype=self.dtype), bias

    def row_count(self) -> Tensor | None:
        return meta(1, dtype=torch.int32) if self.extras else None


SHAPES = {
    "gemma-2-9b, 1 row": Shape(1, 3584, 256000, 30.0, BFLOAT16, False),
    "llama-3-8b, 32 rows": Shape(32, 4096, 128256, None, BFLOAT16, False),
    "gemma-2-2b, 64 rows": Shape(64, 2304, 256000, 30.0, BFLOAT16, False),
    "gemma-2-2b, 128 rows": Shape(128, 2304, 256000, 30.0, BFLOAT16, False),
    "gemma-2-9b, 256 rows": Shape(256, 3584, 256000, 30.0, BFLOAT16, False),
    "llama-3-8b, 256 rows": Shape(256, 4096, 128256, None, BFLOAT16, False),
    "qwen2.5-0.5b with extras, 256 rows": Shape(256, 896, 151936, None, FLOAT16, True),
    "odd with extras, 16 rows": Shape(16, 123, 50257, 30.0, BFLOAT16, True),
    "odd float32 with extras, 256 rows": Shape(256, 123, 50257, 30.0, FLOAT32, True),
}


def multiplies(kernel: str, shape: str) -> bool:
    """Whether a kernel has a product that belongs on tensor cores."""
    return kernel.startswith("project") and SHAPES[shape].dtype is not FLOAT32


def launches(shape: str) -> list[Launch]:
    s = SHAPES[shape]
    with recording(*MODULES) as found:
        linear_argmax.linear_argmax(*s.inputs(), s.softcap, s.row_count())
    return found
