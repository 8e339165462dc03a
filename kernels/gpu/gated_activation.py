"""Gated activations of the feed-forward block on a GPU."""

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gated_activation import Activation

SMALL = (256, 1)
"""Columns and warps of a program: each thread has 8 columns, one 16-byte load of two bytes each."""
LARGE = (1024, 4)
"""The same in fewer, larger programs: an SM holds at most 32, which would be half of its warps with ``SMALL``."""
ENOUGH_PROGRAMS = 1024
"""Where ``LARGE`` makes at least these: several for each SM of any GPU (an H200 has 132, a B200 148)."""


def gated_activation(gate_up: Tensor, activation: Activation) -> Tensor:
    """As engine.kernels.gated_activation; float32 inside, rounded once."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if out.numel():
        block, warps = LARGE if rows * triton.cdiv(width, LARGE[0]) >= ENOUGH_PROGRAMS else SMALL
        gated_activation_kernel[(rows, triton.cdiv(width, block))](
            gate_up, out, width, IS_GELU=activation == "gelu_tanh", BLOCK=block, num_warps=warps
        )
    return out


@triton.jit
def gated_activation_kernel(
    gate_up: tl.tensor, out: tl.tensor, width: tl.tensor, IS_GELU: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Both are gate * sigmoid(z): (1 + tanh(z / 2)) / 2 is sigmoid(z), whose exponential may overflow without harm."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + column, mask=inside, other=0.0).to(tl.float32)
    z = gate
    if IS_GELU:
        z = gate * (1.5957691216057308 + 0.07135481627260025 * gate * gate)  # 2 sqrt(2 / pi), and 0.044715 of it
    activated = gate / (1.0 + tl.exp(-z))
    tl.store(out + row * width + column, (activated * up).to(out.dtype.element_ty), mask=inside)
