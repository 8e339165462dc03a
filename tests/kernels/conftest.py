"""Runs a test with every implementation this machine has: ask for ``impl``, or ``instruction_set`` for C++ alone."""

import importlib
from collections.abc import Iterator

import pytest

from engine.kernels.native import Impl, native

INSTRUCTION_SETS = ("avx512", "avx2", "portable")


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


@pytest.fixture(scope="module", autouse=True)
def _every_output_is_written(poisoned_memory: None) -> None:
    """A kernel that leaves a part of its output as it was returns NaN."""
