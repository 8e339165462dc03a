import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from engine.kernels import LinearWeight, linear, native_name
from engine.kernels.native import native
from tests.kernels.conftest import INSTRUCTION_SETS

ARGUMENTS = {
    "linear": 10,
    "linear_argmax": 13,
    "attention": 19,
    "rope_kv_write": 16,
    "rms_norm": 9,
    "gated_activation": 7,
    "pack_weight": 7,
    "embed": 7,
    "product": 14,
    "pack_transposed": 6,
}


@pytest.fixture
def reloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """native() as in a new process; for changes of what it depends on."""
    monkeypatch.delenv("DIFFPO_CPU_KERNELS", raising=False)
    native.cache_clear()
    yield monkeypatch
    native.cache_clear()


def test_the_chosen_instruction_set_is_the_one_in_use(instruction_set: str) -> None:
    library = native()
    assert library is not None
    assert library.name == native_name() == instruction_set
    assert library.module.kernels(instruction_set.upper()) == (library.table, instruction_set)


def test_the_widest_instruction_set_is_the_default(reloaded: pytest.MonkeyPatch) -> None:
    _cpu = pytest.importorskip("engine.kernels._cpu")
    for name in INSTRUCTION_SETS:
        try:
            expected = _cpu.kernels(name)
            break
        except ValueError:
            continue
    assert _cpu.kernels() == _cpu.kernels(None) == expected
    assert native_name() == expected[1]
    reloaded.setenv("DIFFPO_CPU_KERNELS", "")
    native.cache_clear()
    assert native_name() == expected[1]


def test_torch_can_be_forced(reloaded: pytest.MonkeyPatch) -> None:
    reloaded.setenv("DIFFPO_CPU_KERNELS", "torch")
    assert native() is None
    assert native_name() == "torch"
    weight = LinearWeight.from_dense(torch.eye(3))
    assert not weight.packed
    assert torch.equal(linear(torch.eye(3), weight), torch.eye(3))


def test_unknown_instruction_set(reloaded: pytest.MonkeyPatch) -> None:
    pytest.importorskip("engine.kernels._cpu")
    reloaded.setenv("DIFFPO_CPU_KERNELS", "sse9")
    with pytest.raises(ValueError, match="this processor cannot run the 'sse9' kernels"):
        native()


def test_without_the_extension(reloaded: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Said once; everything runs, except what asks for C++."""
    reloaded.setitem(sys.modules, "engine.kernels._cpu", None)  # makes the import fail
    with caplog.at_level(logging.WARNING, "engine.kernels"):
        assert native_name() == native_name() == "torch"
    (record,) = caplog.records
    assert "C++ CPU kernels not available" in record.getMessage()
    weight = LinearWeight.from_dense(torch.eye(3))
    assert torch.equal(linear(torch.eye(3), weight), torch.eye(3))
    with pytest.raises(ValueError, match=r'impl="cpp" cannot run here: the C\+\+ extension is not built'):
        linear(torch.eye(3), weight, impl="cpp")


def test_nothing_is_loaded_by_the_import() -> None:
    code = "import sys, engine.kernels; sys.exit('engine.kernels._cpu' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("function", "count"), ARGUMENTS.items())
def test_calls_with_wrong_arguments_raise(function: str, count: int, instruction_set: str) -> None:
    """No dereference of what was not given: every count but the right one, and every place with a wrong type."""
    library = native()
    assert library is not None
    call = getattr(library.module, function)
    for wrong in (0, 1, count - 1, count + 1, 40):
        with pytest.raises(TypeError, match=f"expected {count} arguments, got {wrong}"):
            call(*[0] * wrong)
    for place in range(count):
        with pytest.raises(TypeError):
            call(*[0] * place, "text", *[0] * (count - place - 1))
        with pytest.raises(TypeError):
            call(*[0] * place, None, *[0] * (count - place - 1))
    with pytest.raises(OverflowError):
        call(*[2**70] * count)
    with pytest.raises(TypeError):
        call(*[0] * count, threads=1)


def test_kernels_with_wrong_arguments_raises() -> None:
    _cpu = pytest.importorskip("engine.kernels._cpu")
    with pytest.raises(TypeError):
        _cpu.kernels(3)
    with pytest.raises(TypeError, match="at most 1 argument"):
        _cpu.kernels("portable", None)
    with pytest.raises(ValueError, match="'' kernels"):
        _cpu.kernels("")
    with pytest.raises(ValueError, match="cannot run"):
        _cpu.kernels("torch")


def test_out_of_memory_raises(instruction_set: str) -> None:
    """A copy of the rows that no machine can hold: the rows themselves are never read."""
    library = native()
    assert library is not None
    with pytest.raises(MemoryError, match="out of memory in a CPU kernel"):
        library.module.linear(library.table, 0, 0, 0, 0, 1 << 24, 32, 1 << 24, 0, 1)
