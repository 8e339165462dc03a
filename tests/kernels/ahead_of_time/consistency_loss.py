"""The kernels of every plan of the consistency loss."""

from dataclasses import dataclass

import torch

from engine.kernels.consistency_loss import (
    triton_dense,
    triton_gather,
    triton_math,
    triton_recompute,
    triton_sparse,
)
from engine.kernels.consistency_loss.problem import Needs, Problem
from engine.kernels.consistency_loss.triton_rows import Chunk, Results
from tests.kernels.ahead_of_time.compiling import Launch, distinct, meta, recording

MODULES = (triton_dense, triton_math, triton_recompute, triton_gather, triton_sparse)


@dataclass(frozen=True)
class Shape:
    """What kernels are specialised to; ``extras``: bias, temperature and statistics."""

    d: int
    v: int
    softcap: float | None
    dtype: torch.dtype
    extras: bool


SHAPES = {
    "gemma-2-9b": Shape(3584, 256000, 30.0, torch.bfloat16, False),
    "llama-3-8b": Shape(4096, 128256, None, torch.bfloat16, False),
    "llama-3-8b with extras": Shape(4096, 128256, 30.0, torch.bfloat16, True),
    "odd float32": Shape(123, 50257, None, torch.float32, False),
}


def multiplies(kernel: str, shape: str) -> bool:
    """Whether a kernel has a product that belongs on tensor cores."""
    return kernel.startswith(("project", "gathered")) and SHAPES[shape].dtype is not torch.float32


def problem(shape: Shape, rows: int) -> Problem:
    index, s = meta(rows, dtype=torch.int64), shape
    return Problem(
        meta(rows, s.d, dtype=s.dtype), meta(rows, s.d, dtype=s.dtype), meta(s.v, s.d, dtype=s.dtype),
        meta(s.v, dtype=s.dtype) if s.extras else None, index, index, meta(rows), meta(rows), s.softcap,
        2.0 if s.extras else 1.0, 0.1, "sparse",
    )  # fmt: skip


def launches(shape: str) -> list[Launch]:
    """Those of every plan, of one chunk and one block of columns."""
    return launches_of(SHAPES[shape])


def launches_of(shape: Shape, rows: int = 8192) -> list[Launch]:
    """``rows`` per stream in all."""
    p, needs = problem(shape, rows), Needs(True, True, True, shape.extras, shape.extras)
    index = meta(rows // 8, dtype=torch.int64)
    part = Chunk(index[:0], index[:0], index, index, index, index, index)
    with recording(*MODULES) as found:
        logits, differences = triton_dense.buffers(p, needs, part.rows, 128)
        work = triton_sparse.Work(p, needs, logits, differences)
        for _ in range(2):  # the second adds
            work.add(part, Results(p, needs))
        hidden, labels = part.hidden(p), part.labels(p)
        sums = triton_recompute.row_sums(p, hidden, labels, needs.stats)
        width = min(shape.v, triton_recompute.block_width(p, part))
        log_p, g = meta(part.heads, width), differences[:, :width]
        triton_recompute._differences(p, part, hidden, labels, sums, part.scale(p), g, log_p, slice(0, width))
    return distinct(found)
