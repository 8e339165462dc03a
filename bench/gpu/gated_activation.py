"""Gated activations at the feed-forward widths of well-known models."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import liger
from bench.gpu.case import Case, difference, rounding
from engine.kernels import gated_activation
from engine.kernels.gated_activation import Activation


def cases(device: torch.device, *, tiny: bool) -> Iterator[Case]:
    """Llama-3-8B and Gemma-2-2B, whose widths are 14336 and 9216."""
    for activation, width in (("gelu_tanh", 70),) if tiny else (("silu", 14336), ("gelu_tanh", 9216)):
        for rows in (3,) if tiny else (256, 1, 4096):
            yield case(device, rows, width, activation)  # type: ignore[arg-type]


def case(device: torch.device, rows: int, width: int, activation: Activation) -> Case:
    gate_up = torch.randn(rows, 2 * width, device=device).to(torch.bfloat16)

    def eager(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up

    program = torch.compile(eager, dynamic=False)
    variants = {
        "ours": lambda: gated_activation(gate_up, activation, impl="triton"),
        "eager": lambda: eager(gate_up),
        "torch.compile": lambda: program(gate_up),
    }
    if activation == "silu" and (joined := liger.forward("swiglu", "LigerFusedGateUpSiLUMulFunction")):
        variants["liger"] = lambda: joined(gate_up)
    if activation == "gelu_tanh" and (apart := liger.forward("geglu", "LigerGELUMulFunction")):
        gate, up = (part.contiguous() for part in gate_up.chunk(2, dim=-1))  # what it reads, and would copy to
        variants["liger"] = lambda: apart(gate, up)
    moved = 3 * rows * width * gate_up.element_size()
    shape = f"{activation} {rows} x {width}"
    # computed in float32 and rounded once
    return Case(
        "gated_activation", shape, variants, moved, 10 * rows * width, lambda out: difference(out, eager(gate_up.float())),
        2 * rounding(gate_up.dtype),
    )  # fmt: skip
