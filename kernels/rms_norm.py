"""Root-mean-square normalisation, with the residual addition before it."""

import torch
from torch import Tensor

from engine.kernels.native import Impl, address, choose, is_native_layout


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """``h / sqrt(mean(h^2) + eps) * weight`` over the last axis, h = x, or residual + x (written back to ``residual``).

    x, residual [m, d]; weight [d] float32 (Gemma stores weight - 1: add it first) -> [m, d] in x's dtype.
    """
    shapes_fit = x.dim() == 2 and weight.shape == x.shape[1:] and (residual is None or residual.shape == x.shape)
    supported = shapes_fit and is_native_layout(x, weight, residual)
    library = choose(impl, supported, "contiguous float32 inputs [m, d] and [d]")
    if library is None:
        return _reference(x, weight, eps, residual)
    out = torch.empty_like(x)
    library.module.rms_norm(
        library.table, x.data_ptr(), address(residual), weight.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], eps,
        library.threads,
    )  # fmt: skip
    return out


def _reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    if residual is not None:
        x = residual.add_(x)
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)
