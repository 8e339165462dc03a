"""Which chips the Triton kernels are launched on; without one, the question is put to fake tensors."""

import importlib
import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.kernels import triton_choice
from engine.kernels.triton_choice import choose_triton, reason_against_triton
from engine.kv_cache import KVCache

pytest.importorskip("triton")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.Tensor]:
    triton_choice._unfit.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    launchable = SimpleNamespace(get_current_device=lambda: 0)
    monkeypatch.setattr(importlib.import_module("triton.runtime.driver"), "driver", SimpleNamespace(active=launchable))
    with FakeTensorMode():
        tensor = torch.empty(2, device="cuda")
    assert tensor.is_cuda
    yield tensor
    triton_choice._unfit.cache_clear()


def test_chips_from_ampere_on(on_gpu: torch.Tensor) -> None:
    assert reason_against_triton(on_gpu) is None
    assert choose_triton("auto", on_gpu, True, "")
    assert not choose_triton("torch", on_gpu, True, "")


def test_inputs_that_do_not_fit_are_told_of_once(on_gpu: torch.Tensor, caplog: pytest.LogCaptureFixture) -> None:
    triton_choice._say_unsupported.cache_clear()
    with caplog.at_level(logging.WARNING, "engine.kernels"):
        for _ in range(2):
            assert not choose_triton("auto", on_gpu, False, "contiguous inputs")
        assert not choose_triton("torch", on_gpu, False, "other inputs")
        with pytest.raises(ValueError, match="it needs other inputs"):
            choose_triton("triton", on_gpu, False, "other inputs")
    [record] = caplog.records
    assert "it needs contiguous inputs" in record.getMessage()
    triton_choice._say_unsupported.cache_clear()


def test_tensors_on_a_cpu_only_where_that_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by who has set TRITON_INTERPRET for kernels of his own."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for forced in (None, "triton", "other"):
        if forced:
            monkeypatch.setenv("DIFFPO_KERNELS", forced)
        triton_choice.forced_on_cpus.cache_clear()
        assert choose_triton("auto", torch.empty(2), True, "") == (forced == "triton")
        cache = KVCache(1, 1, 1, 16, torch.float32, torch.device("cpu"))
        assert cache.layout == ("nhd" if forced == "triton" else "panels")
    triton_choice.forced_on_cpus.cache_clear()


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_older_chips(on_gpu: torch.Tensor, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert not choose_triton("auto", on_gpu, True, "")
    with pytest.raises(ValueError, match=rf"capability 8.0 or higher, got {capability[0]}.{capability[1]}"):
        choose_triton("triton", on_gpu, True, "")


def test_amd(on_gpu: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not choose_triton("auto", on_gpu, True, "")
    with pytest.raises(ValueError, match="sized for NVIDIA's chips"):
        choose_triton("triton", on_gpu, True, "")


def test_without_a_compiler_for_its_launcher(
    on_gpu: torch.Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What Triton does at its first launch on such a machine, found out before anything is launched, and once."""
    calls = []

    class Driver:
        @property
        def active(self) -> object:
            calls.append(1)
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    monkeypatch.setattr(importlib.import_module("triton.runtime.driver"), "driver", Driver())
    with caplog.at_level(logging.WARNING, "engine.kernels"):
        assert not choose_triton("auto", on_gpu, True, "")
        assert not choose_triton("auto", on_gpu, True, "")
    assert len(calls) == len(caplog.records) == 1
    assert "Failed to find C compiler" in caplog.text
    with pytest.raises(ValueError, match="Failed to find C compiler"):
        choose_triton("triton", on_gpu, True, "")
