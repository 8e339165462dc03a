"""Loss and gradients of every implementation against float64 autograd on ordinary inputs."""

from typing import Any

import pytest
import torch

from engine.kernels import consistency_loss
from engine.kernels.consistency_loss.operation import LossImpl
from tests.kernels.consistency_cases import Case, assert_close, error, plain, random_case, rounding, run
from tests.kernels.references import randn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("m", "drafts", "d", "v"),
    [(1, 1, 1, 2), (3, 5, 123, 33), (17, 1, 64, 507), (40, 2, 33, 2049), (130, 3, 48, 97), (33, 1, 130, 4100)],
)
def test_loss_and_gradients(m: int, drafts: int, d: int, v: int, dtype: torch.dtype, loss_impl: LossImpl) -> None:
    case = random_case(m, drafts, d, v, dtype=dtype, ignored=0.3 if m > 1 else 0, omega=7.0)
    assert_close(run(case, loss_impl), case)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 5.0},
        {"softcap": 30.0, "bias": True, "temperature": 2.0},
        {"temperature": 0.5, "omega": 1e3},
        {"bias": True, "omega": 0.0},
        {"kl_normalization": "vocabulary", "omega": 1e3},
        {"ignore_index": 3, "ar_denominator": 40.0, "consistency_denominator": 7.5},
        {"label_weights": randn(8, 21).abs(), "pair_weights": randn(9, 63), "omega": 3.0},
        {"scale": 20.0, "softcap": 5.0},
    ],
    ids=lambda o: ",".join(o),
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
def test_options(options: dict[str, Any], dtype: torch.dtype, loss_impl: LossImpl) -> None:
    case = random_case(21, 3, 40, 515, dtype=dtype, seed=5, **options)
    assert_close(run(case, loss_impl), case)


def test_a_large_vocabulary(loss_impl: LossImpl) -> None:
    case = random_case(3, 1, 16, 256_000, omega=2.0, ignored=0, unpaired=0)
    assert_close(run(case, loss_impl), case, bounded=loss_impl != "torch")


@pytest.mark.parametrize("distance", [0.3, 0.05, 0.01])
def test_bfloat16_gradient_of_the_drafts(distance: float, loss_impl: LossImpl) -> None:
    """The difference of the distributions survives: logits rounded to bfloat16 lose 2 to 100 % of it here."""
    case = random_case(64, 1, 256, 3000, seed=3, dtype=torch.bfloat16, distance=distance, ignored=0, unpaired=0)
    exact = plain(case).grads[1]
    actual = run(case, loss_impl).grads[1]
    assert error(actual, exact) <= 2e-3 * float(exact.norm()) + rounding(exact, torch.bfloat16)
    logits = [(h @ case.weight.T).float() for h in (case.target[case.pairs], case.draft)]
    rounded = (logits[1].softmax(-1) - logits[0].softmax(-1)).double() @ case.weight.double() * (1e3 / 64)
    assert error(rounded, exact) > 0.015 * float(exact.norm())


def test_equal_streams_have_no_divergence(loss_impl: LossImpl) -> None:
    case = random_case(37, 1, 65, 1001, ignored=0, unpaired=0, distance=0)
    results = run(case, loss_impl)
    # a BLAS may add up a row in another order where it lies elsewhere; the other implementations may not
    assert abs(results.consistency) <= (1e-6 if loss_impl == "torch" else 0)
    assert results.grads[1].abs().max() <= (1e-3 if loss_impl == "torch" else 0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
def test_stats(dtype: torch.dtype, loss_impl: LossImpl) -> None:
    case = random_case(19, 2, 24, 700, dtype=dtype, softcap=5.0, temperature=2.0, bias=True)
    assert case.bias is not None
    tensors = (case.target, case.draft, case.weight, case.labels, case.pairs)
    out = consistency_loss(*tensors, bias=case.bias, impl=loss_impl, return_stats=True, **case.options)
    stats = out.stats
    assert stats is not None
    hidden = torch.cat((case.target, case.draft)).double()
    s = 5.0 * torch.tanh((hidden @ case.weight.double().T + case.bias.double()) / 5.0)
    p = s.softmax(-1)
    torch.testing.assert_close(stats.lse, s.logsumexp(-1).float(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(stats.entropy, -(p * p.log()).sum(-1).float(), rtol=5e-6, atol=5e-6)
    best = s.argmax(-1)
    assert torch.equal(stats.argmax_agrees, (best[19:] == best[case.pairs]) & (case.pairs >= 0))
    assert consistency_loss(*tensors, impl=loss_impl).stats is None


def test_the_same_bits_every_time(loss_impl: LossImpl) -> None:
    case = random_case(90, 2, 96, 3000, dtype=torch.bfloat16, softcap=30.0, bias=True)
    first = run(case, loss_impl)
    for _ in range(3):
        again = run(case, loss_impl)
        assert torch.equal(again.loss, first.loss)
        assert all(map(torch.equal, again.grads, first.grads))


def test_micro_batches_add_up(loss_impl: LossImpl) -> None:
    case = random_case(24, 2, 32, 300, omega=5.0, seed=11)
    whole = run(case, loss_impl)
    counts = {
        "ar_denominator": torch.tensor(int((case.labels != -100).sum())),
        "consistency_denominator": float((case.pairs >= 0).sum()),
    }
    weight_gradient, loss = torch.zeros_like(whole.grads[2]), torch.zeros(())
    for start in range(0, 24, 6):
        rows = (case.pairs >= start) & (case.pairs < start + 6)
        part = Case(
            case.target[start : start + 6], case.draft[rows], case.weight, case.labels[start : start + 6],
            case.pairs[rows] - start, None, {"omega": 5.0, **counts},
        )  # fmt: skip
        results = run(part, loss_impl)
        loss, weight_gradient = loss + results.loss, weight_gradient + results.grads[2]
    torch.testing.assert_close(loss, whole.loss, rtol=2e-6, atol=0)
    assert error(weight_gradient, whole.grads[2].double()) <= 2e-6 * float(whole.grads[2].norm())
