"""liger-kernel as a peer: a stand-in takes its arguments, since neither a GPU nor the library may be here."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import gated_activation, liger, rms_norm
from bench.gpu.case import difference

CPU = torch.device("cpu")


def add_and_normalise(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Any:
    assert (offset, casting) == (0.0, "gemma")
    h = x + residual
    return F.rms_norm(h.float(), h.shape[-1:], weight, eps).to(x.dtype), h


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    assert gate.is_contiguous()
    assert up.is_contiguous()
    return F.gelu(gate, approximate="tanh") * up


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules and names of liger-kernel 0.8.5."""
    for name, functions in {
        "liger_kernel": {},
        "liger_kernel.ops": {},
        "liger_kernel.ops.fused_add_rms_norm": {"LigerFusedAddRMSNormFunction": add_and_normalise},
        "liger_kernel.ops.swiglu": {"LigerFusedGateUpSiLUMulFunction": silu_mul},
        "liger_kernel.ops.geglu": {"LigerGELUMulFunction": gelu_mul},
    }.items():
        module = ModuleType(name)
        for function, apply in functions.items():
            setattr(module, function, SimpleNamespace(apply=apply))
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("installed")
def test_it_gets_the_same_work() -> None:
    for case in (
        rms_norm.case(CPU, 3, 48),
        gated_activation.case(CPU, 3, 70, "silu"),
        gated_activation.case(CPU, 3, 70, "gelu_tanh"),
    ):
        assert difference(case.variants["liger"](), case.variants["eager"]()) <= case.bound


def test_without_it_there_is_no_such_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # makes the import fail
    assert liger.forward("swiglu", "LigerFusedGateUpSiLUMulFunction") is None
    assert "liger" not in rms_norm.case(CPU, 3, 48).variants


@pytest.mark.usefixtures("installed")
def test_a_version_without_the_function() -> None:
    assert liger.forward("swiglu", "Gone") is None
