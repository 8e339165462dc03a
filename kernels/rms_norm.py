"""Root-mean-square normalisation, with the residual addition before it."""

import torch
from torch import Tensor

from engine.kernels.native import Impl, address, choose, is_native_layout
from engine.kernels.triton_choice import choose_triton, is_triton_layout

TRITON_MAX_WIDTH = 16384  # a row is held in registers
TRITON_INPUTS = (
    f"contiguous x [m, d <= {TRITON_MAX_WIDTH}], residual of its dtype and float32 weight [d] on one device, without "
    "gradients"
)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """``h / sqrt(mean(h^2) + eps) * weight`` over the last axis, h = x, or residual + x (written back to ``residual``).

    x, residual [m, d]; weight [d] float32 (Gemma stores weight - 1: add it first) -> [m, d] in x's dtype. Below float32, h
    is rounded to x's dtype, as it is stored, and the result once: as transformers' Gemma2RMSNorm has it, while its
    LlamaRMSNorm also rounds before it multiplies by the weight, which makes its error larger.
    """
    shapes_fit = x.dim() == 2 and weight.shape == x.shape[1:] and (residual is None or residual.shape == x.shape)
    triton_fits = shapes_fit and x.shape[1] <= TRITON_MAX_WIDTH and weight.dtype is torch.float32
    triton_fits = triton_fits and (residual is None or residual.dtype is x.dtype)
    if choose_triton(impl, x, triton_fits and is_triton_layout(x, weight, residual), TRITON_INPUTS):
        from engine.kernels.gpu import rms_norm as gpu

        with torch.cuda.device_of(x):  # Triton launches on the current device
            return gpu.rms_norm(x, weight, eps, residual)
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
