"""Rotation of queries and keys and the write of keys and values into their pages."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.gpu.case import Case, difference, rounding
from engine.kernels import PAGE_SIZE, kv_cache_shapes, rope_kv_write

SHAPES = {"llama-3-8b": (32, 8, 128), "gemma-2-2b": (8, 4, 256)}


def cases(device: torch.device, *, tiny: bool) -> Iterator[Case]:
    """By query heads, KV heads and their size."""
    for name, (heads, kv_heads, head_dim) in {"tiny": (4, 2, 16)}.items() if tiny else SHAPES.items():
        for rows in (3,) if tiny else (256, 1, 4096):
            yield case(device, name, rows, heads, kv_heads, head_dim)


def case(device: torch.device, name: str, rows: int, heads: int, kv_heads: int, head_dim: int) -> Case:
    dtype = torch.bfloat16
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, device=device).to(dtype)
    pages = -(-rows // PAGE_SIZE)
    slots = torch.randperm(pages * PAGE_SIZE, device=device)[:rows]
    positions = torch.arange(rows, device=device)
    angle = torch.rand(rows, head_dim // 2, device=device)
    rotation = torch.cat((angle.cos(), angle.sin()), dim=-1)
    caches = [
        torch.zeros(shape, dtype=dtype, device=device) for shape in kv_cache_shapes(pages, kv_heads, head_dim, "nhd")
    ]

    def ours() -> tuple[Tensor, ...]:
        part = scratch.copy_(qkv)  # it is rotated in place
        rope_kv_write(
            part, rotation, positions, slots, caches[0], caches[1], head_dim=head_dim, layout="nhd", impl="triton"
        )
        return part, *caches

    def plain(part: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        x = part.view(rows, -1, head_dim)
        cos, sin = rotation[positions][:, None].chunk(2, dim=-1)
        both = x[:, : heads + kv_heads].float()
        low, high = both.chunk(2, dim=-1)
        x[:, : heads + kv_heads] = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(dtype)
        page, offset = slots // PAGE_SIZE, slots % PAGE_SIZE
        k_cache[page, offset], v_cache[page, offset] = x[:, heads : heads + kv_heads], x[:, heads + kv_heads :]

    def error(out: object) -> float:
        """Rotated in float32 and rounded once; into caches of their own, as what ours wrote elsewhere would stay in its."""
        part, *empty = qkv.clone(), *map(torch.zeros_like, caches)
        plain(part, *empty)
        return difference(out, (part, *empty))

    def eager() -> tuple[Tensor, ...]:
        plain(scratch.copy_(qkv), *caches)
        return scratch, *caches

    def compiled() -> tuple[Tensor, ...]:
        program(scratch.copy_(qkv), *caches)
        return scratch, *caches

    scratch = torch.empty_like(qkv)
    program = torch.compile(plain, dynamic=False)
    # read and written: the row (once more for the copy every variant makes), the caches' part; the rotation is read
    row = qkv.numel() * dtype.itemsize
    moved = 4 * row + 2 * rows * kv_heads * head_dim * dtype.itemsize + rows * (4 * head_dim + 16)
    variants = {"ours": ours, "eager": eager, "torch.compile": compiled}
    flops = 6 * rows * (heads + kv_heads) * head_dim
    return Case("rope_kv_write", f"{name} {rows} rows", variants, moved, flops, error, 2 * rounding(dtype))
