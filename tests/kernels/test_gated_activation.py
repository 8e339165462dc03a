import pytest
import torch

from engine.kernels import gated_activation
from engine.kernels.gated_activation import Activation
from engine.kernels.native import Impl
from tests.kernels.references import EPSILON, TINY, activated, assert_accurate, randn

INFINITY, NAN = float("inf"), float("nan")
activations = pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])


def magnitude(gate_up: torch.Tensor, exact: torch.Tensor, activation: Activation) -> torch.Tensor:
    """SiLU is exact to its last places until its sigmoid becomes subnormal; 1 + tanh cancels long before."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    floor = TINY / EPSILON if activation == "silu" else 1.0
    return exact.abs() + (gate * up).abs() * floor


@activations
@pytest.mark.parametrize("rows", [0, 1, 5, 33])
@pytest.mark.parametrize("width", [1, 3, 15, 16, 17, 31, 509])
def test_widths(width: int, rows: int, activation: Activation, impl: Impl) -> None:
    gate_up = randn(0, rows, 2 * width, scale=3.0)
    before = gate_up.clone()
    exact = activated(gate_up.double(), activation)
    out = gated_activation(gate_up, activation, impl=impl)
    assert_accurate(out, exact, activated(gate_up, activation), magnitude(gate_up, exact, activation))
    assert torch.equal(gate_up, before)


@activations
def test_the_whole_range(activation: Activation, impl: Impl) -> None:
    """From where the activation is linear to where it is zero or the gate itself."""
    size = torch.cat((torch.logspace(-38, 4, 900, dtype=torch.float64), torch.linspace(0, 110, 1101)))
    gate = torch.cat((size, -size)).float()
    gate_up = torch.cat((gate, randn(0, gate.numel())))[None]
    exact = activated(gate_up.double(), activation)
    out = gated_activation(gate_up, activation, impl=impl)
    assert_accurate(out, exact, activated(gate_up, activation), magnitude(gate_up, exact, activation))


@activations
def test_special_values(activation: Activation, impl: Impl) -> None:
    """As the formulas give them in float64: NaN for a gate of -inf, as torch's own activations."""
    gate = torch.tensor([0.0, -0.0, 1e4, -1e4, 1e20, -1e20, INFINITY, -INFINITY, NAN, 1.0, -1e4, 1.0] * 3)
    up = torch.tensor([1.0, 1.0, -2.0, 2.0, 2.0, 2.0, -1.0, 1.0, 1.0, INFINITY, INFINITY, NAN] * 3)
    gate_up = torch.cat((gate, up))[None]
    exact = activated(gate_up.double(), activation)[0]
    out = gated_activation(gate_up, activation, impl=impl)[0]
    nan, infinite = exact.isnan(), exact.isinf()
    assert out.isnan().tolist() == nan.tolist()
    assert out[infinite].tolist() == exact[infinite].tolist()
    rest = ~nan & ~infinite
    plain, finite = activated(gate_up, activation)[0, rest], gate_up.view(2, -1)[:, rest].reshape(1, -1)
    assert_accurate(out[rest][None], exact[rest][None], plain[None], magnitude(finite, exact[rest][None], activation))


@activations
def test_values_keep_their_bits_anywhere(activation: Activation, instruction_set: str) -> None:
    """In any row and at any place in it, the scalar tail included."""
    gate_up = randn(0, 33, 2 * 509, scale=3.0)
    gate, up = gate_up.chunk(2, dim=-1)
    together = gated_activation(gate_up, activation, impl="cpp")
    for rows in ([7], [32, 0]):
        assert torch.equal(gated_activation(gate_up[rows], activation, impl="cpp"), together[rows])
    shifted = torch.cat((gate[:, 5:200], up[:, 5:200]), dim=-1)
    assert torch.equal(gated_activation(shifted, activation, impl="cpp"), together[:, 5:200])


@activations
def test_bfloat16_takes_the_reference(activation: Activation, instruction_set: str) -> None:
    gate_up = randn(0, 3, 32, dtype=torch.bfloat16)
    out = gated_activation(gate_up, activation)
    assert out.dtype == torch.bfloat16
    exact = activated(gate_up.double(), activation)
    gate, up = gate_up.double().chunk(2, dim=-1)
    # the activation and the product are each rounded to bfloat16
    plain = (activated(torch.cat((gate, torch.ones_like(up)), dim=-1), activation).bfloat16().double() * up).bfloat16()
    assert_accurate(out, exact, plain, (gate * up).abs())


def test_refused_inputs(instruction_set: str) -> None:
    gate_up = randn(0, 4, 8)
    for wrong in (gate_up.double(), gate_up.T, gate_up[:, :7].contiguous(), gate_up[0], gate_up[:, ::2]):
        with pytest.raises(ValueError, match=r'impl="cpp" cannot run here: it needs a contiguous float32 input'):
            gated_activation(wrong, "silu", impl="cpp")
    with pytest.raises(RuntimeError):
        gated_activation(gate_up[:, :7].contiguous(), "silu")
    with pytest.raises(ValueError, match="impl must be"):
        gated_activation(gate_up, "silu", impl="no")  # type: ignore[arg-type]
