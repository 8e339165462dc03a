"""What the operations of engine.kernels compute, written plainly, and inputs for them.

Every function computes in the dtype of its inputs: float64 gives the exact result, float32 the plain computation whose
error a kernel is measured by (``assert_accurate``).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.kernels import PAGE_SIZE, KVLayout, kv_cache_shapes
from engine.kernels.native import native

EPSILON = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).tiny
FEW = 4  # units in the last place


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, dtype=torch.float64, generator=generator) * scale).to(dtype)


def tolerance(exact: Tensor, plain: Tensor, magnitude: Tensor) -> Tensor:
    """Twice the error of ``plain`` and a few ulp of ``magnitude``: the size of the terms that each value is made of.

    The largest error of ``plain`` counts, relative to ``magnitude``; that of one value may be zero by chance.
    """
    unit = magnitude.double().clamp_min(TINY)
    plain_error = ((plain.double() - exact).abs() / unit).max() if exact.numel() else 0.0
    return unit * (2 * plain_error + FEW * EPSILON)


def assert_within(actual: Tensor, exact: Tensor, allowed: Tensor) -> None:
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    ratio = (actual - exact).abs_().div_(allowed)
    worst = ratio.max().item()  # NaN if there is one, which fails
    assert worst <= 1, f"error {worst:.3g} times the tolerance, at {divmod(int(ratio.argmax()), exact.shape[-1])}"


def assert_accurate(actual: Tensor, exact: Tensor, plain: Tensor, magnitude: Tensor) -> None:
    assert_within(actual, exact, tolerance(exact, plain, magnitude))


def multiplied(x: Tensor, weight_dtype: torch.dtype) -> Tensor:
    """What the C++ kernels in use multiply with weights of a type."""
    library = native()
    rounds = library is not None and library.name == "avx512_bf16" and weight_dtype is torch.bfloat16
    return x.bfloat16().to(x.dtype) if rounds else x


def linear(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x @ matrix.T
    return y if bias is None else y + bias


def soft_capped(z: Tensor, cap: float | None) -> Tensor:
    return cap * torch.tanh(z / cap) if cap else z


def lowest_argmax(values: Sequence[float]) -> int:
    """Of a row; NaN never wins, -1 where there is nothing else."""
    best = -1
    for i, value in enumerate(values):
        if not math.isnan(value) and (best < 0 or value > values[best]):
            best = i
    return best


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def activated(gate_up: Tensor, activation: str) -> Tensor:
    width = gate_up.shape[1] // 2
    gate, up = gate_up[:, :width], gate_up[:, width:]
    if activation == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """x [t, heads, head_dim], rotation [t, head_dim] of each row: cos, then sin, of head_dim / 2 angles."""
    half = x.shape[-1] // 2
    cos, sin = rotation[:, None, :half], rotation[:, None, half:]
    low, high = x[..., :half], x[..., half:]
    return torch.cat((low * cos - high * sin, low * sin + high * cos), dim=-1)


def rotation_table(positions: int, head_dim: int) -> Tensor:
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


def attention(
    q: Tensor, k: Tensor, v: Tensor, first_position: int, scale: float, softcap: float | None = None, window: int = 0,
    rounded: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Of one sequence: q [rows, heads, head_dim], k and v [length, kv_heads, head_dim] -> [rows, heads, head_dim].

    ``rounded``: the weights and the result are, as an implementation in that type cannot avoid.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    seen = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    for row in range(q.shape[0]):
        position = first_position + row
        seen[row, max(0, position - window + 1) if window else 0 : position + 1] = True
    scores = soft_capped(torch.einsum("ihd,jhd->hij", q, k) * scale, softcap)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    if rounded is None:
        return torch.einsum("hij,jhd->ihd", weights, v)
    return torch.einsum("hij,jhd->ihd", weights.to(rounded).to(v.dtype), v).to(rounded)


@dataclass(frozen=True)
class PagedCase:
    """Sequences with their keys and values, dense and in pages; do not change the tensors: cases are shared."""

    q: Tensor
    """[t, >= heads * head_dim]."""
    k: list[Tensor]
    """Of every sequence, [length, kv_heads, head_dim]."""
    v: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    row_start: Tensor
    first_position: Tensor
    heads: int

    def exact(
        self, dtype: torch.dtype, *, scale: float, softcap: float | None, window: int, absolute: bool = False,
        rounded: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """What attention should give, computed in ``dtype``; ``absolute``: with the values' absolute values."""
        head_dim = self.k[0].shape[2]
        q = self.q[:, : self.heads * head_dim].to(dtype).unflatten(1, (self.heads, head_dim))
        bounds, first = self.row_start.tolist(), self.first_position.tolist()
        parts = []
        for s, (k, v) in enumerate(zip(self.k, self.v, strict=True)):
            values = v.abs() if absolute else v
            rows = q[bounds[s] : bounds[s + 1]]
            parts.append(attention(rows, k.to(dtype), values.to(dtype), first[s], scale, softcap, window, rounded))
        return torch.cat(parts).flatten(1)

    def of_type(self, dtype: torch.dtype) -> "PagedCase":
        """With queries, keys and values rounded to ``dtype``."""
        k, v = ([part.to(dtype) for part in parts] for parts in (self.k, self.v))
        return replace(
            self, q=self.q.to(dtype), k=k, v=v, k_cache=self.k_cache.to(dtype), v_cache=self.v_cache.to(dtype)
        )


@functools.cache
def paged_case(
    spans: tuple[tuple[int, int], ...],
    kv_heads: int,
    group: int,
    head_dim: int,
    extra_columns: int = 0,
    seed: int = 0,
    layout: KVLayout = "panels",
) -> PagedCase:
    """Of every sequence ``(first position, rows)``. Whatever no sequence has written holds NaN, whole pages included."""
    heads = kv_heads * group
    lengths = [first + rows for first, rows in spans]
    q = randn(seed, sum(rows for _, rows in spans), heads * head_dim + extra_columns)
    k = [randn(seed + 1 + 2 * s, length, kv_heads, head_dim) for s, length in enumerate(lengths)]
    v = [randn(seed + 2 + 2 * s, length, kv_heads, head_dim) for s, length in enumerate(lengths)]
    counts = [-(-length // PAGE_SIZE) for length in lengths]
    pages = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
    k_shape, v_shape = kv_cache_shapes(len(pages), kv_heads, head_dim, layout)
    k_cache, v_cache = torch.full(k_shape, float("nan")), torch.full(v_shape, float("nan"))
    v_cache[..., head_dim:] = 0  # the padding
    k_at, v_at = (k_cache, v_cache) if layout == "nhd" else (k_cache.permute(0, 3, 1, 2), v_cache.permute(0, 2, 1, 3))
    unowned = pages.pop()
    table = torch.full((len(spans), max(counts) + 1), unowned, dtype=torch.int32)
    for s, count in enumerate(counts):
        for i in range(count):
            table[s, i] = page = pages.pop()
            for offset in range(min(PAGE_SIZE, lengths[s] - i * PAGE_SIZE)):
                k_at[page, offset] = k[s][i * PAGE_SIZE + offset]
                v_at[page, offset, :, :head_dim] = v[s][i * PAGE_SIZE + offset]
    row_start = torch.tensor([0, *(rows for _, rows in spans)]).cumsum(0).int()
    first_position = torch.tensor([first for first, _ in spans], dtype=torch.int32)
    return PagedCase(q, k, v, k_cache, v_cache, table, row_start, first_position, heads)
