"""Matrix products whose results are never rounded below float32."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 8192  # rows of an accumulator that are added to at a time where one call cannot add


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel with a product inside divides it."""

    rows: int
    """Of a result's tile; in a product over lists, what shares a list."""
    columns: int
    depth: int
    warps: int
    stages: int


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [n, k] @ b [k, m] in float32: the inputs' own products, summed in float32 and not rounded after that."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out) if out is not None else torch.mm(a, b)
    if a.is_cuda:
        if out is not None:
            return torch.mm(a, b, out_dtype=torch.float32, out=out)
        return torch.mm(a, b, out_dtype=torch.float32)
    return product(a.float(), b.float(), out)


def accumulate(to: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """to [n, m] float32 += a [n, k] @ b [k, m]; ``first``: overwrites it."""
    if first:
        product(a, b, out=to)
    elif a.dtype == torch.float32:
        torch.addmm(to, a, b, out=to)
    elif a.is_cuda and _adds_in_place(a.device, a.dtype):
        torch.addmm(to, a, b, out_dtype=torch.float32, out=to)
    else:
        for start in range(0, a.shape[0], BLOCK):
            to[start : start + BLOCK] += product(a[start : start + BLOCK], b)


@functools.cache
def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch adds a product of ``dtype`` to a float32 matrix: older ones refuse."""
    a, to = torch.ones(8, 8, dtype=dtype, device=device), torch.ones(8, 8, device=device)
    try:
        torch.addmm(to, a, a, out_dtype=torch.float32, out=to)
    except RuntimeError:
        return False
    return bool((to == 9).all())
