"""Which chips the Triton kernels are launched on; without one, the question is put to fake tensors."""

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.kernels import triton_choice
from engine.kernels.triton_choice import choose_triton, reason_against_triton

pytest.importorskip("triton")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.Tensor]:
    triton_choice._unfit.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        tensor = torch.empty(2, device="cuda")
    assert tensor.is_cuda
    yield tensor
    triton_choice._unfit.cache_clear()


def test_chips_from_ampere_on(on_gpu: torch.Tensor) -> None:
    assert reason_against_triton(on_gpu) is None
    assert choose_triton("auto", on_gpu, True, "")
    assert not choose_triton("torch", on_gpu, True, "")


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
