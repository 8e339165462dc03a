"""Gated activations of the feed-forward block."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from engine.kernels.native import Impl, choose, is_native_layout, new_output

Activation = Literal["silu", "gelu_tanh"]


def gated_activation(gate_up: Tensor, activation: Activation, *, impl: Impl = "auto") -> Tensor:
    """``act(gate) * up`` for gate_up [m, 2 * width] holding gate and up side by side -> [m, width]."""
    supported = gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0 and is_native_layout(gate_up)
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
