"""Adversarial inputs of the consistency loss: extreme logits, odd sizes, masks, layouts."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.kernels import consistency_loss
from engine.kernels.consistency_loss.operation import LossImpl
from tests.kernels.consistency_cases import Case, assert_close, error, plain, random_case, rounding, run
from tests.kernels.references import randn

INFINITY, NAN = float("inf"), float("nan")


def logits_case(target: Tensor, draft: Tensor, labels: list[int], **options: object) -> Case:
    """Rows whose logits are the given ones: the head is the identity."""
    pairs = torch.arange(len(draft)) % len(target)
    return Case(target, draft, torch.eye(target.shape[1]), torch.tensor(labels), pairs, None, dict(options))


def test_disjoint_masks_and_rows_that_only_teach(loss_impl: LossImpl) -> None:
    case = random_case(12, 1, 16, 130, ignored=0, unpaired=0, omega=2.0)
    labels, pairs = case.labels.clone(), torch.arange(12)
    labels[:6], pairs[6:] = -100, -1
    case = dataclasses.replace(case, labels=labels, pairs=pairs)
    results = run(case, loss_impl)
    assert_close(results, case)
    assert not results.grads[0][:6].any()
    assert not results.grads[1][6:].any()


def test_unequal_streams_paired_explicitly(loss_impl: LossImpl) -> None:
    case = random_case(5, 4, 16, 130, ignored=0, unpaired=0, omega=2.0)
    keep = torch.tensor([0, 3, 4, 9, 11, 12, 19])
    case = dataclasses.replace(case, draft=case.draft[keep], pairs=torch.tensor([4, 4, 0, -1, 2, 4, 0]))
    assert_close(run(case, loss_impl), case)


@pytest.mark.parametrize("m", [0, 1, 70])
def test_all_rows_masked_is_a_connected_zero(m: int, loss_impl: LossImpl) -> None:
    case = random_case(m, 2, 8, 50, ignored=1.0, unpaired=1.0)
    results = run(case, loss_impl)
    assert (results.loss, results.ar, results.consistency) == (0, 0, 0)
    assert not any(grad.any() for grad in results.grads)


@pytest.mark.parametrize(("m", "r"), [(0, 0), (0, 3), (3, 0), (1, 1)])
def test_empty_and_single_rows(m: int, r: int, loss_impl: LossImpl) -> None:
    pairs = torch.full((r,), 0 if m else -1)
    case = Case(randn(0, m, 8), randn(1, r, 8), randn(2, 50, 8), torch.zeros(m, dtype=torch.long), pairs, None, {})
    # a single pair's few roundings in plain float32 are luck, which differs from one BLAS to another
    assert_close(run(case, loss_impl), case, twice=(m, r) != (1, 1))


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 506, 10**9])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_ignore_index(ignore_index: int, index_dtype: torch.dtype, loss_impl: LossImpl) -> None:
    case = random_case(20, 1, 16, 507, ignore_index=ignore_index, omega=2.0)
    case = dataclasses.replace(case, labels=case.labels.to(index_dtype), pairs=case.pairs.to(index_dtype))
    assert_close(run(case, loss_impl), case)


@pytest.mark.parametrize("v", [1, 2, 7, 8, 9, 127, 128, 129, 1023, 1024, 1025, 2056, 50257])
def test_vocabulary_around_the_blocks(v: int, loss_impl: LossImpl) -> None:
    case = random_case(9, 1, 123, v, omega=3.0, unpaired=0, seed=v)
    labels = case.labels.clone()
    labels[0], labels[1] = v - 1, 0
    case = dataclasses.replace(case, labels=labels)
    # a BLAS adds up tens of thousands of words less exactly than that
    assert_close(run(case, loss_impl), case, bounded=v < 10_000 or loss_impl != "torch")


@pytest.mark.parametrize("d", [1, 15, 16, 47, 48, 49, 191, 192, 193, 250])
def test_hidden_sizes_around_the_panels(d: int, loss_impl: LossImpl) -> None:
    case = random_case(9, 1, d, 257, omega=3.0, unpaired=0, seed=d)
    assert_close(run(case, loss_impl), case, twice=d < 250)


@pytest.mark.parametrize("m", [15, 16, 17, 47, 48, 49, 95, 96, 97, 192, 193])
def test_rows_around_the_panels_and_groups(m: int, loss_impl: LossImpl) -> None:
    case = random_case(m, 1, 24, 200, omega=3.0, unpaired=0.1, seed=m)
    assert_close(run(case, loss_impl), case)
    case = case.cast(torch.bfloat16)
    assert_close(run(case, loss_impl), case)


def test_the_same_gradient_of_the_head_from_any_number_of_groups(
    loss_impl: LossImpl, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loss_impl != "cpp":
        pytest.skip("only C++ works in groups of rows")
    from engine.kernels.consistency_loss.native_loss import loss_and_gradients

    case = random_case(480, 1, 32, 300, omega=3.0)
    monkeypatch.setitem(loss_and_gradients.__globals__, "FEW_ROWS", 10**6)
    assert_close(run(case, loss_impl), case)  # one group
    monkeypatch.setitem(loss_and_gradients.__globals__, "FEW_ROWS", 1)
    monkeypatch.setitem(loss_and_gradients.__globals__, "KEPT_BYTES", 0.01)
    assert_close(run(case, loss_impl), case)  # a group for every target row


def test_one_hot_teacher_and_underflowing_student(loss_impl: LossImpl) -> None:
    target = torch.zeros(3, 40)
    target[0, 3], target[1, 7], target[2, 39] = 200.0, 90.0, 30.0
    draft = target.roll(5, 1)
    case = logits_case(target, draft, [3, 7, 0], omega=0.5)
    assert_close(run(case, loss_impl), case)


@pytest.mark.parametrize("softcap", [None, 30.0, 5.0])
def test_huge_logits(softcap: float | None, loss_impl: LossImpl) -> None:
    """1e4 without a cap; far into saturation with one, where the gradient vanishes."""
    target, draft = randn(0, 6, 50, scale=1e4), randn(1, 6, 50, scale=1e4)
    case = logits_case(target, draft, [0, 1, 2, 3, 4, 49], softcap=softcap, omega=1e-3)
    assert_close(run(case, loss_impl), case, bounded=False)


def test_constant_rows_and_a_certain_label(loss_impl: LossImpl) -> None:
    target = torch.full((4, 33), 7.5)
    target[3, 5] = 40.0
    case = logits_case(target, torch.full((4, 33), -2.0), [0, 32, 5, 5], omega=2.0)
    assert_close(run(case, loss_impl), case)


@pytest.mark.parametrize("distance", [1e-2, 1e-4])
def test_near_converged_rows(distance: float, loss_impl: LossImpl) -> None:
    case = random_case(30, 1, 64, 900, distance=distance, ignored=0, unpaired=0)
    assert_close(run(case, loss_impl), case, bounded=False)


def test_words_ruled_out_by_the_bias(loss_impl: LossImpl) -> None:
    """Logits of minus infinity in both streams: probability 0, and 0 log 0 is 0."""
    case = random_case(10, 1, 16, 300, bias=True, ignored=0, unpaired=0, omega=2.0)
    assert case.bias is not None
    bias, labels = case.bias.clone(), case.labels % 100
    bias[128:290] = -INFINITY
    low = dataclasses.replace(case, bias=bias.clamp_min(-1e3), labels=labels)
    results = run(dataclasses.replace(case, bias=bias, labels=labels), loss_impl)
    assert_close(results, low)


@pytest.mark.parametrize("broken", [NAN, INFINITY])
def test_broken_rows_show(broken: float, loss_impl: LossImpl) -> None:
    case = random_case(20, 1, 16, 300, ignored=0, unpaired=0)
    draft = case.draft.clone()
    draft[4, 3] = broken
    results = run(dataclasses.replace(case, draft=draft), loss_impl)
    assert not results.loss.isfinite()
    assert results.ar.isfinite()
    assert results.grads[1][4].isnan().all()
    assert results.grads[1][[3, 5]].isfinite().all()
    assert results.grads[0].isfinite().all()


@pytest.mark.parametrize("where", ["target", "weight"])
@pytest.mark.parametrize("broken", [NAN, INFINITY])
def test_broken_teachers_and_heads_show(broken: float, where: str, loss_impl: LossImpl) -> None:
    """In the target row's own terms and its students'; a word of the head is in every row's sum."""
    case = random_case(20, 2, 16, 300, ignored=0, unpaired=0)
    tensor = getattr(case, where).clone()
    tensor[4, 3] = broken
    results = run(dataclasses.replace(case, **{where: tensor}), loss_impl)
    assert not results.ar.isfinite()
    assert not results.consistency.isfinite()
    rows = torch.full((20,), where == "weight")
    rows[4] = True
    assert results.grads[0].isnan().any(1).tolist() == rows.tolist()
    assert results.grads[1].isnan().any(1).tolist() == rows[case.pairs].tolist()
    assert results.grads[2].isnan().any()


def test_omega_zero_does_not_touch_the_drafts(loss_impl: LossImpl) -> None:
    case = random_case(20, 1, 16, 300, omega=0.0)
    results = run(dataclasses.replace(case, draft=torch.full_like(case.draft, NAN)), loss_impl)
    assert_close(results, case)
    assert not results.grads[1].any()


def test_logits_beyond_float16(loss_impl: LossImpl) -> None:
    """Logits of 1e5 and more; gradients above 65504 become infinite in their own tensor, where rounding makes them so."""
    case = random_case(6, 1, 32, 40, dtype=torch.float16, ignored=0, unpaired=0, omega=1e-3)
    case = dataclasses.replace(case, target=case.target * 200, draft=case.draft * 200, weight=case.weight * 200)
    assert (case.target.float() @ case.weight.float().T).abs().max() > 1e5
    assert_close(run(case, loss_impl), case, bounded=False)
    large = run(case, loss_impl, omega=1e4)
    exact = plain(dataclasses.replace(case, options={"omega": 1e4}))
    for actual, e in zip(large.grads, exact.grads, strict=True):
        assert torch.equal(actual.isinf(), e.half().isinf())
        assert not actual.isnan().any()
    assert exact.grads[1].half().isinf().any()


@pytest.mark.slow
def test_a_head_of_more_than_two_to_the_31_elements() -> None:
    """Its last rows are read and their words count; all others are zeros, in memory that is never really there."""
    pytest.importorskip("engine.kernels._cpu")  # the reference would make a copy in float32
    d, v = 16384, 131072 + 40
    weight = torch.from_numpy(np.zeros((v, d), dtype=np.int16)).view(torch.bfloat16)
    weight[-3:] = randn(0, 3, d, scale=d**-0.5).bfloat16()
    target, draft = (randn(seed, 1, d, dtype=torch.bfloat16) for seed in (1, 2))
    leaves = [target.requires_grad_(), draft.requires_grad_()]
    out = consistency_loss(*leaves, weight, torch.tensor([v - 2]), torch.tensor([0]), omega=3.0, impl="cpp")
    grads = torch.autograd.grad(out.loss, leaves)
    # the same problem with one word of all zeros, which counts v - 3 times
    tail = torch.cat((torch.zeros(1, d, dtype=torch.float64), weight[-3:].double()))
    times = torch.tensor([v - 3.0, 1, 1, 1], dtype=torch.float64)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    log_p, log_q = ((z := h @ tail.T) - (z.exp() * times).sum(-1, keepdim=True).log() for h in exact)
    log_p_teacher = log_p.detach()
    loss = -log_p[0, 2] + 3.0 * (times * log_p_teacher.exp() * (log_p_teacher - log_q)).sum()
    torch.testing.assert_close(out.loss.double(), loss, rtol=2e-6, atol=0)
    for actual, e in zip(grads, torch.autograd.grad(loss, exact), strict=True):
        assert error(actual, e) <= 2e-3 * float(e.norm()) + rounding(e, torch.bfloat16)


def test_views(loss_impl: LossImpl) -> None:
    """Shifted rows, every second row, a transposed head."""
    case = random_case(12, 1, 32, 150, ignored=0, unpaired=0, omega=2.0)
    streams = torch.stack((case.target, case.draft), 1).reshape(24, 32).requires_grad_()
    head = case.weight.T.contiguous().requires_grad_()
    padded = torch.cat((torch.tensor([5]), case.labels))
    order = torch.arange(12)
    out = consistency_loss(streams[::2], streams[1::2], head.T, padded[1:], order, omega=2.0, impl=loss_impl)
    exact = plain(dataclasses.replace(case, pairs=order, draft=streams.detach()[1::2]))
    grads = torch.autograd.grad(out.loss, (streams, head))
    torch.testing.assert_close(grads[0][::2].double(), exact.grads[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads[1].T.double(), exact.grads[2], rtol=1e-4, atol=1e-6)


def test_losses_without_gradients_are_the_same(loss_impl: LossImpl) -> None:
    case = random_case(150, 2, 32, 1500, softcap=10.0, temperature=2.0, omega=3.0)
    results = run(case, loss_impl)
    out = consistency_loss(
        case.target, case.draft, case.weight, case.labels, case.pairs, impl=loss_impl, **case.options
    )
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, results.loss, rtol=1e-6, atol=0)
