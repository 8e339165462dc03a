"""Root-mean-square normalisation on a GPU, with the residual addition before it: one program per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    """As engine.kernels.rms_norm; a row's bits do not depend on the other rows."""
    rows, d = x.shape
    out = torch.empty_like(x)
    if out.numel():
        block = triton.next_power_of_2(d)
        rms_norm_kernel[(rows,)](
            x, residual, weight, out, d, eps, HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=warps(block)
        )
    return out


def warps(block: int) -> int:
    """8 values per thread up to 4096: one 16-byte load of two bytes each. All of a row's loads are then under way at once, and
    more programs or warps could not shorten it. 32 per thread at 16384 still fit its registers (table in
    bench/results/triton_aot)."""
    return max(1, min(16, block // 256))


@triton.jit
def rms_norm_kernel(
    x: tl.tensor, residual: tl.tensor, weight: tl.tensor, out: tl.tensor, d: tl.tensor, eps: tl.tensor,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """h is rounded to its dtype before it is normalised: what the next layer reads of it is what was normalised."""
    column = tl.arange(0, BLOCK)
    inside = column < d
    start = tl.program_id(0).to(tl.int64) * d
    h = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        total = h + tl.load(residual + start + column, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(x.dtype.element_ty)
        tl.store(residual + start + column, rounded, mask=inside)
        h = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(h * h, 0) / d + eps)
    tl.store(out + start + column, (h * scale * w).to(out.dtype.element_ty), mask=inside)
