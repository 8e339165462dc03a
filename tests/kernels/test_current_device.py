"""Triton launches on the current device, whichever the tensors are on: every operation makes theirs the current one."""

import importlib
from collections.abc import Callable

import pytest
import torch

from engine.kernels import (
    JacobiState,
    LinearWeight,
    PackedRows,
    gated_activation,
    jacobi_accept,
    jacobi_pack,
    linear_argmax,
    linear_sample,
    paged_attention,
    rms_norm,
    rope_kv_write,
)
from tests.kernels.references import paged_case

pytest.importorskip("triton")
CPU = torch.device("cpu")


def attend() -> None:
    case = paged_case(((3, 2),), 1, 2, 24, layout="nhd")
    tensors = (case.q, case.k_cache, case.v_cache, case.block_table, case.row_start, case.first_position)
    paged_attention(*tensors, heads=2, scale=0.3, layout="nhd", impl="triton")


def rotate() -> None:
    rows, caches = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1, 32, 1, 8)
    rope_kv_write(
        torch.zeros(2, 24), torch.zeros(4, 8), rows, rows, *caches, head_dim=8, layout="nhd", impl="triton"
    )  # fmt: skip


def draw() -> None:
    rows = torch.zeros(2, dtype=torch.int64)
    weight = LinearWeight(torch.zeros(5, 8), 5, 8, packed=False)
    linear_sample(torch.zeros(2, 8), weight, temperature=torch.ones(2), seeds=rows, positions=rows, impl="triton")


def pack() -> None:
    jacobi_pack(JacobiState.allocate(2, 40, 2, CPU), PackedRows.allocate(16, 2, CPU), 8, impl="triton")


def accept() -> None:
    rows = torch.zeros(16, dtype=torch.int64)
    starts, eos = torch.zeros(3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    jacobi_accept(JacobiState.allocate(2, 40, 2, CPU), rows, starts, eos, impl="triton")


CALLS: dict[str, Callable[[], object]] = {
    "paged_attention.paged_attention": attend,
    "rope_kv_write.rope_kv_write": rotate,
    "rms_norm.rms_norm": lambda: rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6, impl="triton"),
    "gated_activation.gated_activation": lambda: gated_activation(torch.zeros(2, 8), "silu", impl="triton"),
    "linear_argmax.linear_argmax": lambda: linear_argmax(
        torch.zeros(2, 8), LinearWeight(torch.zeros(5, 8), 5, 8, packed=False), impl="triton"
    ),
    "linear_sample.linear_sample": draw,
    "jacobi_pack.pack": pack,
    "jacobi_accept.accept": accept,
}
"""What an operation launches with, in engine.kernels.gpu, and a call of it."""


@pytest.mark.parametrize("launcher", CALLS)
def test_launches_with_the_tensors_device_current(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[torch.Tensor] = []
    launched: list[bool] = []

    class DeviceOf:
        def __init__(self, tensor: torch.Tensor) -> None:
            self._tensor = tensor

        def __enter__(self) -> None:
            inside.append(self._tensor)

        def __exit__(self, *error: object) -> None:
            inside.pop()

    module, name = launcher.split(".")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # else CPU tensors are refused
    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    operations = importlib.import_module(f"engine.kernels.gpu.{module}")
    monkeypatch.setattr(operations, name, lambda *given: launched.append(len(inside) == 1))
    CALLS[launcher]()
    assert launched == [True]
