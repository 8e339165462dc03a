"""Gated activations of the feed-forward block."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.native import Impl, choose, is_native_layout, new_output
from engine.kernels.triton_choice import choose_triton, is_triton_layout

Activation = Literal["silu", "gelu_tanh"]


def gated_activation(gate_up: Tensor, activation: Activation, *, impl: Impl = "auto") -> Tensor:
    """``act(gate) * up`` for gate_up [m, 2 * width] holding gate and up side by side -> [m, width]."""
    shape_fits = gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0
    triton_fits = shape_fits and is_triton_layout(gate_up)
    if choose_triton(impl, gate_up, triton_fits, "a contiguous input [m, 2 * width] without gradient"):
        from engine.kernels.gpu import gated_activation as gpu

        with torch.cuda.device_of(gate_up):  # Triton launches on the current device
            return gpu.gated_activation(gate_up, activation)
    supported = shape_fits and is_native_layout(gate_up)
    library = choose(impl, supported, "a contiguous float32 input [m, 2 * width]")
    if library is None:
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = new_output(rows, width)
    library.module.gated_activation(
        library.table,
        gate_up.data_ptr(),
        out.data_ptr(),
        rows,
        width,
        activation == "gelu_tanh",
        library.threads,
    )
    return out
