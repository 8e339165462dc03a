"""Single operations at the widths of a Llama of 135M parameters: 576 hidden, 9 heads over 3 of 64, vocabulary 49152.

Peers are what PyTorch offers for the same (``eager``; for attention its fused kernel on contiguous K and V). With bfloat16
weights the engine keeps activations in float32, PyTorch's are bfloat16 too: the less work is theirs.
"""

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.suite.case import Case, Operation, Shape
from engine.kernels import (
    PAGE_SIZE,
    LinearWeight,
    gated_activation,
    kv_cache_shapes,
    linear,
    linear_argmax,
    paged_attention,
    rms_norm,
    rope_kv_write,
)

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
LAYERS = 30
"""Weights used in turn, so that they come from where a model's come from and not from the L2 cache."""
BFLOAT16_TOLERANCE = 0.02
EPS = 1e-6


def tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype is torch.float32 else BFLOAT16_TOLERANCE


@functools.lru_cache(1)
def layers(columns: int, outputs: int, dtype: torch.dtype) -> tuple[list[LinearWeight], list[Tensor]]:
    """The same matrices as the engine and as PyTorch has them."""
    matrices = [torch.randn(outputs, columns).to(dtype) for _ in range(LAYERS)]
    return [LinearWeight.from_dense(matrix) for matrix in matrices], matrices


def of_linear(shape: Shape, dtype: torch.dtype) -> Case:
    """Rows, inputs, outputs."""
    rows, columns, outputs = shape
    x = torch.randn(rows, columns)
    packed, plain = map(itertools.cycle, layers(columns, outputs, dtype))
    narrow = x.to(dtype)
    calls = {"engine": lambda: linear(x, next(packed)), "eager": lambda: F.linear(narrow, next(plain))}
    return Case(calls, tolerance(dtype))


def of_linear_argmax(shape: Shape, dtype: torch.dtype) -> Case:
    """Rows, inputs, vocabulary. Compared are the values: near-ties may fall to either index."""
    rows, columns, vocabulary = shape
    x, matrix = torch.randn(rows, columns), torch.randn(vocabulary, columns).to(dtype)
    weight, narrow = LinearWeight.from_dense(matrix), x.to(dtype)
    return Case(
        {"engine": lambda: linear_argmax(x, weight)[1], "eager": lambda: F.linear(narrow, matrix).max(-1).values},
        tolerance(dtype),
    )


def of_attention(shape: Shape, dtype: torch.dtype) -> Case:
    """Query rows of one sequence, positions in front of them."""
    rows, prefix = shape
    length = prefix + rows
    pages = -(-length // PAGE_SIZE)
    k_cache, v_cache = (torch.zeros(s) for s in kv_cache_shapes(pages, KV_HEADS, HEAD_DIM))
    q, k, v = (torch.randn(n, heads, HEAD_DIM) for n, heads in ((rows, HEADS), (length, KV_HEADS), (length, KV_HEADS)))
    padded = F.pad(torch.stack((k, v)), (0, 0, 0, 0, 0, pages * PAGE_SIZE - length))
    in_pages = padded.view(2, pages, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    k_cache.copy_(in_pages[0].permute(0, 2, 3, 1))
    v_cache.copy_(in_pages[1].permute(0, 2, 1, 3))
    table, starts, first = (torch.tensor(t, dtype=torch.int32) for t in ([[*range(pages)]], [0, rows], [prefix]))
    flat, scale = q.reshape(rows, -1), HEAD_DIM**-0.5
    contiguous = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]
    mask = torch.ones(rows, length, dtype=torch.bool).tril(prefix)

    def engine() -> Tensor:
        return paged_attention(flat, k_cache, v_cache, table, starts, first, heads=HEADS, scale=scale)

    def sdpa() -> Tensor:
        out = F.scaled_dot_product_attention(*contiguous, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1).reshape(rows, -1)

    return Case({"engine": engine, "sdpa": sdpa})


def of_rms_norm(shape: Shape, dtype: torch.dtype) -> Case:
    """Rows, width; with the residual addition in front."""
    rows, width = shape
    x, weight = torch.randn(rows, width), torch.randn(width)
    ours, theirs = (torch.zeros(rows, width) for _ in range(2))  # residuals: every call adds x

    def eager() -> Tensor:
        theirs.add_(x)
        return F.rms_norm(theirs, (width,), weight, EPS)

    return Case({"engine": lambda: rms_norm(x, weight, EPS, residual=ours), "eager": eager})


def of_rope_kv_write(shape: Shape, dtype: torch.dtype) -> Case:
    """Rows; q and k are rotated where they stand, k and v stored in pages, eagerly in contiguous tensors."""
    (rows,) = shape
    qkv = torch.randn(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    angle = torch.rand(rows, HEAD_DIM // 2)
    rotation, positions = torch.cat((angle.cos(), angle.sin()), dim=-1), torch.arange(rows)
    k_cache, v_cache = (torch.zeros(s) for s in kv_cache_shapes(-(-rows // PAGE_SIZE), KV_HEADS, HEAD_DIM))
    k_plain, v_plain = (torch.zeros(rows, KV_HEADS, HEAD_DIM) for _ in range(2))
    ours, theirs = qkv.clone(), qkv.clone()

    def engine() -> Tensor:
        rope_kv_write(ours, rotation, positions, positions, k_cache, v_cache, head_dim=HEAD_DIM)
        return ours

    def eager() -> Tensor:
        x = theirs.view(rows, -1, HEAD_DIM)
        cos, sin = rotation[positions][:, None].chunk(2, dim=-1)
        rotated = x[:, : HEADS + KV_HEADS]
        low, high = rotated.chunk(2, dim=-1)
        rotated.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1))
        k_plain[positions], v_plain[positions] = x[:, HEADS:-KV_HEADS], x[:, -KV_HEADS:]
        return theirs

    return Case({"engine": engine, "eager": eager})


def of_gated_activation(shape: Shape, dtype: torch.dtype) -> Case:
    """Rows, width of gate and of up."""
    rows, width = shape
    gate_up = torch.randn(rows, 2 * width)

    def eager() -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    return Case({"engine": lambda: gated_activation(gate_up, "silu"), "eager": eager})


def operation(
    build: Callable[[Shape, torch.dtype], Case], peer: str, dtypes: tuple[str, ...], **shapes: tuple[Shape, ...]
) -> Operation:
    """The engine's implementation and one other."""
    return Operation(build, ("engine", peer), shapes, dtypes)


ONE, BOTH = ("float32",), ("float32", "bfloat16")
OPERATIONS = {
    "linear": operation(
        of_linear, "eager", BOTH, tiny=((3, 48, 64),), quick=((1, 576, 3072), (16, 576, 3072), (256, 576, 3072)),
        full=((4, 576, 3072), (12, 576, 3072), (64, 576, 3072), (1024, 576, 3072)),
    ),
    "linear_argmax": operation(
        of_linear_argmax, "eager", BOTH, tiny=((3, 48, 640),), quick=((1, 576, 49152), (16, 576, 49152), (256, 576, 49152)),
        full=((4, 576, 49152), (64, 576, 49152), (16, 2304, 128256)),
    ),
    "paged_attention": operation(
        of_attention, "sdpa", ONE, tiny=((3, 40),), quick=((1, 256), (64, 256), (256, 1024)),
        full=((1, 4096), (16, 4096), (256, 4096)),
    ),
    "rms_norm": operation(
        of_rms_norm, "eager", ONE, tiny=((3, 48),), quick=((1, 576), (256, 576)), full=((64, 576), (256, 4096))
    ),
    "rope_kv_write": operation(of_rope_kv_write, "eager", ONE, tiny=((3,),), quick=((1,), (256,)), full=((64,), (1024,))),
    "gated_activation": operation(
        of_gated_activation, "eager", ONE, tiny=((3, 48),), quick=((1, 1536), (256, 1536)),
        full=((64, 1536), (256, 14336)),
    ),
}  # fmt: skip
