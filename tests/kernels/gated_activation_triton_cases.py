"""The Triton activations against float64, on a GPU or, with TRITON_INTERPRET=1, on a CPU."""

import pytest
import torch

from engine.kernels import gated_activation
from engine.kernels.gated_activation import Activation
from engine.kernels.gpu import gated_activation as gpu
from tests.kernels.references import activated, assert_accurate, randn
from tests.kernels.test_gated_activation import INFINITY, NAN, magnitude
from tests.kernels.triton_device import DEVICE, beyond_32_bits

activations = pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def check(gate_up: torch.Tensor, activation: Activation) -> None:
    exact, before = activated(gate_up.double(), activation), gate_up.clone()
    out = gated_activation(gate_up, activation, impl="triton")
    assert out.dtype is gate_up.dtype
    plain = gated_activation(gate_up, activation, impl="torch")
    if gate_up.dtype is torch.float32:
        plain = activated(gate_up, activation)
    size = magnitude(gate_up, exact, activation)
    if gate_up.dtype is torch.float16:  # its smallest numbers are no smaller than this
        size = size + torch.finfo(torch.float16).tiny
    assert_accurate(out.double(), exact, plain, size)
    assert torch.equal(gate_up, before)


@activations
@dtypes
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (5, 3), (2, 16), (3, 255), (2, 257), (1, 4864)])
def test_widths(rows: int, width: int, activation: Activation, dtype: torch.dtype) -> None:
    check(randn(0, rows, 2 * width, dtype=dtype, scale=3.0).to(DEVICE), activation)


@activations
def test_the_whole_range(activation: Activation) -> None:
    size = torch.cat((torch.logspace(-30, 4, 400, dtype=torch.float64), torch.linspace(0, 110, 551)))
    gate = torch.cat((size, -size)).float()
    check(torch.cat((gate, randn(0, gate.numel())))[None].to(DEVICE), activation)


@activations
def test_special_values(activation: Activation) -> None:
    """As the formulas give them in float64: NaN for a gate of -inf, as torch's own activations."""
    gate = torch.tensor([0.0, -0.0, 1e4, -1e4, 1e20, -1e20, INFINITY, -INFINITY, NAN, 1.0, -1e4, 1.0])
    up = torch.tensor([1.0, 1.0, -2.0, 2.0, 2.0, 2.0, -1.0, 1.0, 1.0, INFINITY, INFINITY, NAN])
    gate_up = torch.cat((gate, up))[None].to(DEVICE)
    exact = activated(gate_up.double(), activation)[0]
    out = gated_activation(gate_up, activation, impl="triton")[0].double()
    torch.testing.assert_close(out, exact, equal_nan=True, rtol=1e-6, atol=0.0)


@activations
@dtypes
def test_values_keep_their_bits_in_any_batch(
    activation: Activation, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the batch's size decides for other programs."""
    gate_up = randn(0, 6, 2 * 309, dtype=dtype, scale=3.0).to(DEVICE)
    one = gated_activation(gate_up[3:4], activation, impl="triton")
    for enough in (1, 1 << 30):
        monkeypatch.setattr(gpu, "ENOUGH_PROGRAMS", enough)
        assert torch.equal(gated_activation(gate_up, activation, impl="triton")[3:4], one)


def test_refused_inputs() -> None:
    gate_up = randn(0, 4, 8).to(DEVICE)
    wrong = (gate_up.double(), gate_up.T, gate_up[:, :7].contiguous(), gate_up[0], gate_up[:, ::2])
    for tensor in (*wrong, gate_up.clone().requires_grad_()):
        with pytest.raises(ValueError, match=r'impl="triton" cannot run here: it needs'):
            gated_activation(tensor, "silu", impl="triton")


@beyond_32_bits
def test_rows_above_two_to_the_31() -> None:
    width = 1 << 14
    gate_up = torch.zeros((1 << 31) // (2 * width) + 3, 2 * width, dtype=torch.bfloat16, device=DEVICE)
    gate_up[-3:] = last = randn(0, 3, 2 * width, dtype=torch.bfloat16).to(DEVICE)
    out = gated_activation(gate_up, "silu", impl="triton")
    assert torch.equal(out[-3:], gated_activation(last, "silu", impl="triton"))
    assert not out[:-3].any()
