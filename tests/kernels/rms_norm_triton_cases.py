"""The Triton normalisation against float64 and transformers, on a GPU or, with TRITON_INTERPRET=1, on a CPU."""

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from engine.kernels import rms_norm
from tests.kernels import references
from tests.kernels.references import assert_accurate, randn
from tests.kernels.triton_device import DEVICE, beyond_32_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def case(seed: int, rows: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, residual."""
    x, weight, residual = randn(seed, rows, d, dtype=dtype), randn(seed + 1, d), randn(seed + 2, rows, d, dtype=dtype)
    return x.to(DEVICE), weight.to(DEVICE), (residual * 3).to(DEVICE)


@dtypes
@pytest.mark.parametrize(("rows", "d"), [(0, 8), (1, 1), (5, 7), (2, 64), (33, 65), (3, 1001), (2, 3584), (1, 16384)])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_rms_norm(rows: int, d: int, with_residual: bool, dtype: torch.dtype) -> None:
    x, weight, residual = case(0, rows, d, dtype)
    h = (residual + x) if with_residual else x
    before, given = x.clone(), residual.clone()
    out = rms_norm(x, weight, 1e-5, residual=given if with_residual else None, impl="triton")
    exact = references.rms_norm(h.double(), weight.double(), 1e-5)
    plain = rms_norm(x, weight, 1e-5, residual=residual.clone() if with_residual else None, impl="torch")
    assert out.dtype is dtype
    assert_accurate(out.double(), exact, plain, exact.abs())
    assert torch.equal(x, before)
    assert torch.equal(given, h if with_residual else residual)


def test_eps_counts_where_the_row_is_small() -> None:
    x = torch.stack((torch.zeros(33), randn(0, 33, scale=1e-4), randn(1, 33, scale=1e15))).to(DEVICE)
    weight = torch.ones(33, device=DEVICE)
    out = rms_norm(x, weight, 1e-3, impl="triton")
    exact = references.rms_norm(x.double(), weight.double(), 1e-3)
    assert_accurate(out.double(), exact, references.rms_norm(x, weight, 1e-3), exact.abs())
    assert out[0].count_nonzero() == 0


def test_nan_stays_in_its_row() -> None:
    x, weight, _ = case(0, 3, 65, torch.float32)
    expected = rms_norm(x, weight, 1e-6, impl="triton")
    x[1, 40] = float("nan")
    out = rms_norm(x, weight, 1e-6, impl="triton")
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], expected[[0, 2]])


@dtypes
def test_rows_keep_their_bits_in_any_batch(dtype: torch.dtype) -> None:
    x, weight, residual = case(0, 20, 301, dtype)
    together = rms_norm(x, weight, 1e-6, residual=residual.clone(), impl="triton")
    for rows in ([7], [19, 0], list(range(19, -1, -1))):
        assert torch.equal(rms_norm(x[rows], weight, 1e-6, residual=residual[rows], impl="triton"), together[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gemma_as_in_transformers(dtype: torch.dtype) -> None:
    """It multiplies by 1 + w in float32 too; only the order of the sum of squares may move a rounding."""
    x, weight, _ = case(3, 40, 256, dtype)
    theirs = Gemma2RMSNorm(256).to(DEVICE, dtype)
    theirs.weight.data.copy_(weight * 0.1)
    out = rms_norm(x, theirs.weight.detach().float() + 1, theirs.eps, impl="triton")
    expected = theirs(x).detach()
    ulp = expected.abs().double() * torch.finfo(dtype).eps
    assert ((out.double() - expected.double()).abs() <= ulp + torch.finfo(dtype).tiny).all()
    assert (out != expected).double().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_llama_is_nearer_to_exact_than_transformers(dtype: torch.dtype) -> None:
    """Which rounds twice: before it multiplies by the weight, and after."""
    x, weight, _ = case(5, 40, 256, dtype)
    theirs = LlamaRMSNorm(256, eps=1e-5).to(DEVICE, dtype)
    theirs.weight.data.copy_(weight)
    stored = theirs.weight.detach().float()
    out = rms_norm(x, stored, 1e-5, impl="triton").double()
    exact, expected = references.rms_norm(x.double(), stored.double(), 1e-5), theirs(x).detach().double()
    assert (out - exact).norm() < (expected - exact).norm()
    band = 1.5 * torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny  # three roundings of half an ulp each
    assert ((out - expected).abs() <= band * 1.01).all()  # 1.01: and what they are relative to


def test_refused_inputs() -> None:
    x, weight, residual = case(0, 4, 8, torch.bfloat16)
    wide = torch.zeros(1, 16385, device=DEVICE)
    for arguments in (
        (x.double(), weight, None), (x, weight[:7], None), (x, weight.bfloat16(), None), (x.T, weight[:4], None),
        (x, weight, residual.float()), (x, weight, residual[:3]), (wide, wide[0], None), (x[:, ::2], weight[:4], None),
        (x.float().requires_grad_(), weight, None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r'impl="triton" cannot run here: it needs'):
            rms_norm(*arguments[:2], 1e-6, residual=arguments[2], impl="triton")


@beyond_32_bits
def test_rows_above_two_to_the_31() -> None:
    d = 1 << 14
    x, residual = (torch.zeros((1 << 31) // d + 3, d, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    x[-3:], weight = randn(0, 3, d, dtype=torch.bfloat16).to(DEVICE), torch.ones(d, device=DEVICE)
    last = [t[-3:].clone() for t in (x, residual)]
    out = rms_norm(x, weight, 1e-6, residual=residual, impl="triton")
    assert torch.equal(out[-3:], rms_norm(last[0], weight, 1e-6, residual=last[1], impl="triton"))
    assert torch.equal(residual[-3:], last[1])
    assert not out[:-3].any()
