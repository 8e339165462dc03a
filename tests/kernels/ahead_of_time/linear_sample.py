"""Projection and sampling; ``extras`` bring the log-probability as well."""

import torch

from engine.kernels.gpu import linear_sample
from tests.kernels.ahead_of_time.compiling import Launch, meta, recording
from tests.kernels.ahead_of_time.linear_argmax import BFLOAT16, FLOAT16, FLOAT32, Shape

MODULES = (linear_sample,)
SHAPES = {
    "gemma-2-9b, 1 row": Shape(1, 3584, 256000, 30.0, BFLOAT16, False),
    "llama-3-8b with extras, 64 rows": Shape(64, 4096, 128256, None, BFLOAT16, True),
    "gemma-2-9b, 256 rows": Shape(256, 3584, 256000, 30.0, BFLOAT16, False),
    "qwen2.5-0.5b with extras, 256 rows": Shape(256, 896, 151936, None, FLOAT16, True),
    "odd with extras, 16 rows": Shape(16, 123, 50257, 30.0, BFLOAT16, True),
    "odd float32 with extras, 256 rows": Shape(256, 123, 50257, 30.0, FLOAT32, True),
}


def multiplies(kernel: str, shape: str) -> bool:
    """Whether a kernel has a product that belongs on tensor cores."""
    return kernel.startswith("project") and SHAPES[shape].dtype is not FLOAT32


def launches(shape: str) -> list[Launch]:
    s = SHAPES[shape]
    index = meta(s.rows, dtype=torch.int64)
    with recording(*MODULES) as found:
        linear_sample.linear_sample(
            *s.inputs(), meta(s.rows), index, index, s.softcap, s.row_count(), log_probability=s.extras
        )
    return found
