"""The kernels of paged attention, by how many lines of queries a sequence has, on every chip's own tiles."""

from dataclasses import dataclass
from unittest import mock

import torch

from engine.kernels.gpu import paged_attention
from engine.kernels.gpu.attention_plan import Chip
from tests.kernels.ahead_of_time.compiling import CHIPS, Launch, distinct, meta, recording

MULTIPROCESSORS = {80: 108, 86: 84, 90: 132, 100: 148, 120: 170}
MAX_PAGES = 256


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    softcap: float | None
    window: int
    rows: int
    sequences: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def few(self) -> bool:
        """Lines of a sequence: too few for the instructions that take 64 of them, and keys are divided."""
        return self.rows // self.sequences * (self.heads // self.kv_heads) <= 16


SHAPES = {
    "gemma-2-9b, 256 rows of 1": Shape(16, 8, 256, 50.0, 4096, 256, 1),
    "gemma-2-2b, 4 rows of 4": Shape(8, 4, 256, 50.0, 4096, 4, 4),
    "gemma-2-2b, 128 rows of 4": Shape(8, 4, 256, 50.0, 4096, 128, 4),
    "llama-3-8b, 256 rows of 1": Shape(32, 8, 128, None, 0, 256, 1),
    "llama-3-8b, 512 rows of 32": Shape(32, 8, 128, None, 0, 512, 32),
    "llama-3-8b, 8 rows of 8": Shape(32, 8, 128, None, 0, 8, 8),
    "qwen-2.5-0.5b, 2048 rows of 8": Shape(14, 2, 64, None, 0, 2048, 8),
    "phi-3, fp16, 16 rows of 8": Shape(32, 32, 96, None, 2047, 16, 8, torch.float16),
    "llama-3-8b, fp32": Shape(32, 8, 128, None, 0, 64, 8, torch.float32),
    "gemma-2-9b, fp32": Shape(16, 8, 256, 50.0, 4096, 64, 8, torch.float32),
    "32 heads to one of 256, fp32": Shape(32, 1, 256, 50.0, 4096, 64, 8, torch.float32),
    "64 heads to one of 128, fp32": Shape(64, 1, 128, 50.0, 4096, 64, 8, torch.float32),
}


def multiplies(kernel: str, shape: str) -> bool | str:
    """16 lines are too few for the newer chips' own instructions."""
    if SHAPES[shape].dtype is torch.float32 or kernel.startswith("combine"):
        return False
    return "mma.sync" if SHAPES[shape].few else True


def launches(shape: str) -> list[Launch]:
    return [launch for chip in CHIPS for launch in launches_on(chip, SHAPES[shape])]


def launches_on(chip: int, s: Shape) -> list[Launch]:
    """As on a chip of this capability."""
    q = meta(s.rows, (s.heads + 2 * s.kv_heads) * s.head_dim, dtype=s.dtype)
    cache = meta(4096, 32, s.kv_heads, s.head_dim, dtype=s.dtype)
    table = meta(s.sequences, MAX_PAGES, dtype=torch.int32)
    starts, first = meta(s.sequences + 1, dtype=torch.int32), meta(s.sequences, dtype=torch.int32)
    here = mock.patch.object(paged_attention, "chip_of", return_value=Chip(chip, MULTIPROCESSORS[chip]))
    with here, recording(paged_attention) as found:
        paged_attention.paged_attention(
            q, cache, cache, table, starts, first, s.heads, s.head_dim**-0.5, s.softcap, s.window,
            None if s.few else 32,
        )  # fmt: skip
    return [launch.only_for(chip) for launch in distinct(found)]
