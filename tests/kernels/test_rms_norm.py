import pytest
import torch

from engine.kernels import rms_norm
from engine.kernels.native import Impl
from tests.kernels import references
from tests.kernels.references import assert_accurate, randn


@pytest.mark.parametrize("rows", [0, 1, 5, 40])
@pytest.mark.parametrize("d", [1, 7, 16, 63, 65, 128, 1001])
def test_rms_norm(d: int, rows: int, impl: Impl) -> None:
    x, weight = randn(0, rows, d), randn(1, d)
    before = x.clone()
    out = rms_norm(x, weight, 1e-6, impl=impl)
    exact = references.rms_norm(x.double(), weight.double(), 1e-6)
    assert_accurate(out, exact, references.rms_norm(x, weight, 1e-6), exact.abs())
    assert torch.equal(x, before)


@pytest.mark.parametrize("rows", [0, 1, 5, 40])
@pytest.mark.parametrize("d", [1, 63, 1001])
def test_residual_becomes_the_sum(d: int, rows: int, impl: Impl) -> None:
    x, residual, weight = randn(0, rows, d), randn(1, rows, d, scale=30.0), randn(2, d)
    before, total = x.clone(), residual + x
    exact = references.rms_norm(residual.double() + x.double(), weight.double(), 1e-5)
    out = rms_norm(x, weight, 1e-5, residual=residual, impl=impl)
    assert_accurate(out, exact, references.rms_norm(total, weight, 1e-5), exact.abs() + 1e-30)
    assert torch.equal(residual, total)
    assert torch.equal(x, before)


def test_eps_counts_where_the_row_is_small(impl: Impl) -> None:
    x, weight = torch.stack((torch.zeros(33), randn(0, 33, scale=1e-4), randn(1, 33, scale=1e15))), torch.ones(33)
    out = rms_norm(x, weight, 1e-3, impl=impl)
    exact = references.rms_norm(x.double(), weight.double(), 1e-3)
    assert_accurate(out, exact, references.rms_norm(x, weight, 1e-3), exact.abs())
    assert out[0].count_nonzero() == 0


def test_nan_stays_in_its_row(impl: Impl) -> None:
    x, weight = randn(0, 3, 65), randn(1, 65)
    expected = rms_norm(x, weight, 1e-6, impl=impl)
    x[1, 40] = float("nan")
    out = rms_norm(x, weight, 1e-6, impl=impl)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], expected[[0, 2]])


def test_rows_keep_their_bits_in_any_batch(instruction_set: str) -> None:
    x, residual, weight = randn(0, 40, 1001), randn(1, 40, 1001), randn(2, 1001)
    together = rms_norm(x, weight, 1e-6, residual=residual.clone(), impl="cpp")
    for rows in ([7], [39, 0], list(range(39, -1, -1))):
        assert torch.equal(rms_norm(x[rows], weight, 1e-6, residual=residual[rows], impl="cpp"), together[rows])


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_bfloat16_is_computed_in_float32(with_residual: bool, instruction_set: str) -> None:
    x, weight = randn(0, 5, 64, dtype=torch.bfloat16), randn(1, 64)
    residual = randn(2, 5, 64, dtype=torch.bfloat16) if with_residual else None
    h = x if residual is None else residual + x
    exact = references.rms_norm(h.double(), weight.double(), 1e-6)
    out = rms_norm(x, weight, 1e-6, residual=residual)
    assert out.dtype == torch.bfloat16
    plain = references.rms_norm(h.float(), weight, 1e-6).bfloat16()
    assert_accurate(out, exact, plain, exact.abs())
    with pytest.raises(ValueError, match=r'impl="cpp" cannot run here: it needs contiguous float32 inputs'):
        rms_norm(x, weight, 1e-6, impl="cpp")


def test_refused_inputs(instruction_set: str) -> None:
    x, weight = randn(0, 6, 8), randn(1, 8)
    wrong = [(x, weight[:7], None), (x, randn(1, 9), None), (x, weight, x[:5]), (x[0], weight, None)]
    for h, w, residual in [*wrong, (x.T, randn(1, 6), None), (x, weight.double(), None)]:
        with pytest.raises(ValueError, match=r'impl="cpp" cannot run here'):
            rms_norm(h, w, 1e-6, residual=residual, impl="cpp")
    for h, w, residual in wrong[:3]:
        with pytest.raises(RuntimeError):
            rms_norm(h, w, 1e-6, residual=residual)
    with pytest.raises(ValueError, match="impl must be"):
        rms_norm(x, weight, 1e-6, impl="none")  # type: ignore[arg-type]
