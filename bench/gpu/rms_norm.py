"""Normalisation with the residual addition, at the widths of well-known models."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import liger
from bench.gpu.case import Case, difference, rounding
from engine.kernels import rms_norm

EPS = 1e-6


def cases(device: torch.device, *, tiny: bool) -> Iterator[Case]:
    """A step's worth, one row and a prompt's worth, of Llama-3-8B, Gemma-2-2B and one wider."""
    for d in (48,) if tiny else (4096, 2304, 8192):
        for rows in (3,) if tiny else (256, 1, 4096):
            yield case(device, rows, d)


def case(device: torch.device, rows: int, d: int) -> Case:
    dtype = torch.bfloat16
    x, residual = (torch.randn(rows, d, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(d, device=device)

    def eager(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        h = residual + x
        return (F.rms_norm(h.float(), (d,), weight, EPS)).to(dtype), h

    def ours() -> tuple[Tensor, Tensor]:
        scratch.copy_(residual)  # written back to: every call would otherwise add to what the last one left
        return rms_norm(x, weight, EPS, residual=scratch, impl="triton"), scratch

    def eager_and_copy() -> tuple[Tensor, Tensor]:
        scratch.copy_(residual)
        return eager(x, scratch)

    def compiled() -> tuple[Tensor, Tensor]:
        scratch.copy_(residual)
        return program(x, scratch)

    scratch = torch.empty_like(residual)
    program = torch.compile(eager, dynamic=False)
    variants = {"ours": ours, "eager": eager_and_copy, "torch.compile": compiled}
    if fused := liger.forward("fused_add_rms_norm", "LigerFusedAddRMSNormFunction"):

        def theirs() -> tuple[Tensor, Tensor]:
            scratch.copy_(residual)
            normalised, h = fused(x, scratch, weight, EPS, 0.0, "gemma")  # all of it in float32, as ours
            return normalised, h

        variants["liger"] = theirs
    # every variant copies the residual first: two more of the matrices to move
    moved = (4 + 2) * rows * d * dtype.itemsize
    return Case(
        "rms_norm",
        f"{rows} x {d}",
        variants,
        moved,
        5 * rows * d,
        lambda out: difference(out, eager(x, residual)),  # computed in float32 and rounded once, as ours
        2 * rounding(dtype),
    )
