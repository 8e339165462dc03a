"""Kernel microbenchmarks: the C++ kernels against the PyTorch operations they replace.

    pytest bench/bench_kernels.py --benchmark-only --benchmark-group-by=func,param:rows

Weights of 30 layers are used in turn, so that they come from where a model's weights come from and not from the L2 cache.
Each line's extra_info has GFLOP/s and GB/s of weights; their ratio at 1 and 256 rows is the knee of engine/window.py.
"""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from engine.kernels import LinearWeight, linear, linear_argmax, paged_attention
from engine.kernels.paged_attention import kv_cache_shapes

LAYERS = 30
HIDDEN, WIDE, VOCABULARY = 576, 3072, 49152
ROWS = [1, 4, 12, 16, 64, 256]


def _note(benchmark: Any, rows: int, columns: int, outputs: int) -> None:
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["GFLOP/s"] = round(2e-9 * rows * columns * outputs / seconds, 1)
    benchmark.extra_info["weight GB/s"] = round(4e-9 * columns * outputs / seconds, 1)


@pytest.mark.parametrize("impl", ["cpp", "torch"])
@pytest.mark.parametrize("rows", ROWS)
def test_linear(benchmark: Any, rows: int, impl: str) -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(WIDE, HIDDEN) for _ in range(LAYERS)]
    x = torch.randn(rows, HIDDEN)
    if impl == "cpp":
        weights = itertools.cycle([LinearWeight.from_dense(matrix) for matrix in matrices])
        benchmark(lambda: linear(x, next(weights), impl="cpp"))
    else:
        plain = itertools.cycle(matrices)
        benchmark(lambda: F.linear(x, next(plain)))
    _note(benchmark, rows, HIDDEN, WIDE)


@pytest.mark.parametrize("impl", ["cpp", "torch"])
@pytest.mark.parametrize("rows", ROWS)
def test_linear_argmax(benchmark: Any, rows: int, impl: str) -> None:
    torch.manual_seed(0)
    matrix, x = torch.randn(VOCABULARY, HIDDEN), torch.randn(rows, HIDDEN)
    weight = LinearWeight.from_dense(matrix)
    if impl == "cpp":
        benchmark(lambda: linear_argmax(x, weight, impl="cpp"))
    else:
        benchmark(lambda: F.linear(x, matrix).argmax(-1))
    _note(benchmark, rows, HIDDEN, VOCABULARY)


@pytest.mark.parametrize("impl", ["cpp", "sdpa"])
@pytest.mark.parametrize("rows", ROWS)
def test_attention(benchmark: Any, rows: int, impl: str) -> None:
    """9 heads over 3 of K and V, size 64, behind a prefix of 256 positions; sdpa gets contiguous K and V for free."""
    torch.manual_seed(0)
    heads, kv_heads, size, prefix = 9, 3, 64, 256
    length = prefix + rows
    pages = -(-length // 32)
    if impl == "cpp":
        k, v = (torch.randn(shape) for shape in kv_cache_shapes(pages, kv_heads, size))
        q = torch.randn(rows, heads * size)
        table, starts, first = (torch.tensor(t, dtype=torch.int32) for t in ([[*range(pages)]], [0, rows], [prefix]))
        benchmark(lambda: paged_attention(q, k, v, table, starts, first, heads=heads, scale=0.125, impl="cpp"))
    else:
        q, k, v = (torch.randn(1, n, m, size) for n, m in ((heads, rows), (kv_heads, length), (kv_heads, length)))
        mask = torch.ones(rows, length, dtype=torch.bool).tril(prefix)
        benchmark(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))
