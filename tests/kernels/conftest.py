"""Runs a test with every implementation this machine has: ask for ``impl``, or ``instruction_set`` for C++ alone."""

import importlib
import importlib.util
import os
from collections.abc import Iterator

import pytest

from engine.kernels.consistency_loss.operation import LossImpl
from engine.kernels.native import Impl, native

INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2", "portable")


def reason_to_skip(name: str) -> str | None:
    try:
        importlib.import_module("engine.kernels._cpu").kernels(name)
    except ImportError:
        return "the C++ extension is not built"
    except ValueError as error:
        return str(error)
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "forced_kernels" not in metafunc.fixturenames:
        return
    parameters = []
    for name in INSTRUCTION_SETS:
        reason = reason_to_skip(name)
        parameters.append(pytest.param(name, marks=pytest.mark.skip(reason=reason) if reason else ()))
    if "instruction_set" not in metafunc.fixturenames:
        parameters.append(pytest.param("torch"))
    metafunc.parametrize("forced_kernels", parameters, indirect=True, scope="module")


@pytest.fixture(scope="module")
def forced_kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFPO_CPU_KERNELS", request.param)
        native.cache_clear()
        yield request.param
    native.cache_clear()


@pytest.fixture(scope="module")
def instruction_set(forced_kernels: str) -> str:
    return forced_kernels


@pytest.fixture(scope="module")
def impl(forced_kernels: str) -> Impl:
    """The value for ``impl=``; with "torch" weights are plain matrices, as where the extension is not built."""
    return "torch" if forced_kernels == "torch" else "cpp"


LOSS_IMPLEMENTATIONS = (*INSTRUCTION_SETS, "torch", "triton")


def reason_to_skip_loss(name: str) -> str | None:
    """Why an implementation of the consistency loss cannot run here; Triton runs on CPU tensors under its interpreter."""
    if name in INSTRUCTION_SETS:
        return reason_to_skip(name)
    if name != "triton":
        return None
    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return "needs TRITON_INTERPRET=1: these tests use CPU tensors"
    missing = [m for m in ("triton", "engine.kernels.consistency_loss.triton") if importlib.util.find_spec(m) is None]
    return f"{missing[0]} is not installed" if missing else None


@pytest.fixture(scope="module", params=LOSS_IMPLEMENTATIONS)
def loss_impl(request: pytest.FixtureRequest) -> Iterator[LossImpl]:
    """The value for ``impl=`` of the consistency loss, C++ with each instruction set."""
    if reason := reason_to_skip_loss(request.param):
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFPO_CPU_KERNELS", request.param if request.param in INSTRUCTION_SETS else "")
        native.cache_clear()
        yield "cpp" if request.param in INSTRUCTION_SETS else request.param
    native.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def _every_output_is_written(poisoned_memory: None) -> None:
    """A kernel that leaves a part of its output as it was returns NaN."""
