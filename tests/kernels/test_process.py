"""The kernels in processes that set torch's defaults, fork, or train."""

import os
import signal
from collections.abc import Callable

import pytest
import torch

from engine.kernels import LinearWeight, embedding, gated_activation, linear, linear_argmax, paged_attention, rms_norm


def _results() -> list[torch.Tensor]:
    cpu = {"dtype": torch.float32, "device": "cpu"}
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(40, 64, generator=generator, **cpu)
    weight = LinearWeight.from_dense(torch.randn(4096, 64, generator=generator, **cpu))
    k, v = torch.randn(2, 1, 64, 32, generator=generator, **cpu), torch.randn(2, 1, 32, 64, generator=generator, **cpu)
    index = {"dtype": torch.int32, "device": "cpu"}
    table, rows, first = (torch.tensor(t, **index) for t in ([[0, 1]], [0, 40], [0]))
    return [
        linear(x, weight),
        *linear_argmax(x, weight),
        embedding(torch.arange(9, device="cpu"), weight),
        gated_activation(x, "silu"),
        rms_norm(x, torch.ones(64, **cpu), 1e-6),
        paged_attention(x, k, v, table, rows, first, heads=1, scale=0.125),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    expected = _results()
    torch.set_default_dtype(dtype)
    try:
        results = _results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(results, expected, strict=True))


def test_the_default_device_changes_nothing() -> None:
    expected = _results()
    with torch.device("meta"):
        results = _results()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_forked_child_computes() -> None:
    """OpenMP's threads do not survive a fork: a kernel that waited for them would hang."""
    x, weight = torch.randn(64, 256), LinearWeight.from_dense(torch.randn(2048, 256))
    expected = linear(x, weight)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        torch.utils.deterministic.fill_uninitialized_memory = False  # torch's own threads are gone as well
        library_result = linear(x, weight).numpy().tobytes()
        os._exit(0 if library_result == expected.numpy().tobytes() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("call", [lambda x: rms_norm(x, torch.ones(8), 1e-6), lambda x: gated_activation(x, "silu")])
def test_gradients_flow_where_they_are_asked_for(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    assert call(x).requires_grad
    with torch.no_grad():
        assert not call(x).requires_grad


def test_ids_outside_the_vocabulary_are_refused() -> None:
    weight = LinearWeight.from_dense(torch.randn(40, 8))
    for bad in (-1, 40, 10**8):
        with pytest.raises(IndexError, match=str(bad)):
            embedding(torch.tensor([0, bad]), weight)
