"""Matrix products whose results are never rounded below float32."""

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


def ask_once(like: Tensor) -> None:
    """Finds out what ``accumulate`` has to know of like's device and dtype, if that is new; not during a capture."""
    if like.is_cuda and like.dtype != torch.float32:
        _adds_in_place(like.device, like.dtype)


_ADDS: dict[tuple[torch.device, torch.dtype], bool] = {}
"""What trials have shown; it is the same for as long as the process lives."""


def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch is known to add a product of ``dtype`` to a float32 matrix.

    Only a trial shows it, which waits for the device. A CUDA graph cannot: during its capture what is not known counts as no.
    """
    if (device, dtype) not in _ADDS and not torch.cuda.is_current_stream_capturing():
        _ADDS[device, dtype] = _tried(device, dtype)
    return _ADDS.get((device, dtype), False)


def _tried(device: torch.device, dtype: torch.dtype) -> bool:
    """Older builds refuse."""
    a, to = torch.ones(8, 8, dtype=dtype, device=device), torch.ones(8, 8, device=device)
    try:
        torch.addmm(to, a, a, out_dtype=torch.float32, out=to)
    except RuntimeError:
        return False
    return bool((to == 9).all())
