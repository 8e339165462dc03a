"""The consistency loss inside autograd, autocast and torch.compile."""

import dataclasses
import itertools
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from engine.kernels import ConsistencyLoss, consistency_loss
from engine.kernels.consistency_loss import reference
from engine.kernels.consistency_loss.operation import LossImpl
from engine.kernels.consistency_loss.problem import Problem
from tests.kernels.consistency_cases import random_case, run

CASE = random_case(10, 2, 12, 60, bias=True, omega=2.0)
DENSE = {"omega": 2.0}


def loss(tensors: list[Tensor], impl: LossImpl, **options: object) -> Tensor:
    bias = tensors[3] if len(tensors) > 3 else None
    return consistency_loss(*tensors[:3], CASE.labels, CASE.pairs, bias=bias, impl=impl, **{**DENSE, **options}).loss  # type: ignore[arg-type]


def test_gradcheck_of_the_reference() -> None:
    """In the student and, by the cross entropy alone, in the target; the teacher is a constant."""
    case = random_case(3, 2, 4, 6, bias=True, dtype=torch.float64, softcap=3.0, temperature=1.7, omega=1.3)
    assert case.bias is not None
    target, draft, weight, bias = (t.requires_grad_() for t in (case.target, case.draft, case.weight, case.bias))

    def by_operation(d: Tensor) -> Tensor:
        out = consistency_loss(
            target.detach(), d, weight.detach(), case.labels, case.pairs, impl="torch", **case.options
        )
        return out.loss

    def cross_entropy(t: Tensor, w: Tensor, b: Tensor) -> Tensor:
        none = torch.full_like(case.pairs, -1)
        return consistency_loss(t, draft.detach(), w, case.labels, none, bias=b, impl="torch", softcap=3.0).loss

    def plain(t: Tensor, d: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        scale = torch.ones(6, dtype=torch.float64)
        alone = torch.full_like(case.pairs, -1)
        p = Problem(t, d, w, None, case.labels.clamp_min(0), alone, scale[:3], scale, 3.0, 1.7, 0.0, "dense")
        return reference.losses(p)

    assert gradcheck(by_operation, (draft,))
    assert gradcheck(cross_entropy, (target, weight, bias))
    assert gradcheck(plain, (target, draft, weight))


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)), ids=str)
def test_every_subset_of_gradients(wanted: tuple[bool, ...], loss_impl: LossImpl) -> None:
    full = run(CASE, loss_impl).grads
    leaves = [t.requires_grad_(w) for t, w in zip(CASE.leaves(), wanted, strict=True)]
    value = loss(leaves, loss_impl)
    assert value.requires_grad == any(wanted)
    if any(wanted):
        value.backward()
    for leaf, gradient, w in zip(leaves, full, wanted, strict=True):
        assert (leaf.grad is not None) == w
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-7)


def test_no_gradient_work_without_gradients(loss_impl: LossImpl, monkeypatch: pytest.MonkeyPatch) -> None:
    registration = sys.modules["engine.kernels.consistency_loss.registration"]
    seen, solve = [], registration.solve
    monkeypatch.setattr(registration, "solve", lambda p, needs, impl: seen.append(needs) or solve(p, needs, impl))
    with torch.no_grad():
        loss(CASE.leaves(), loss_impl)
    loss(CASE.leaves(), loss_impl)
    assert [needs.gradients for needs in seen] == [False, True]


@pytest.mark.parametrize("factor", [0.0, 1.0, -3.0, float("inf")])
def test_incoming_gradients(factor: float, loss_impl: LossImpl) -> None:
    leaves = CASE.leaves()
    once = torch.autograd.grad(loss(leaves, loss_impl), leaves)
    scaled = torch.autograd.grad(loss(leaves, loss_impl), leaves, torch.tensor(factor))
    for a, b in zip(once, scaled, strict=True):
        torch.testing.assert_close(b, a * factor, equal_nan=True)


def test_the_graph_can_be_kept(loss_impl: LossImpl) -> None:
    """Each pass adds the same gradient, whatever was done with the earlier ones."""
    leaves = CASE.leaves()
    once = torch.autograd.grad(loss(leaves, loss_impl), leaves)
    value = loss(leaves, loss_impl) * 2
    value.backward(retain_graph=True)
    value.backward(retain_graph=True)
    value.backward()
    for leaf, gradient in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 6 * gradient)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


def test_a_second_derivative_is_refused(loss_impl: LossImpl) -> None:
    leaves = CASE.leaves()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss(leaves, loss_impl), leaves, create_graph=True)


def test_only_the_loss_has_a_gradient(loss_impl: LossImpl) -> None:
    case = dataclasses.replace(CASE, bias=None)
    out = consistency_loss(*case.leaves(), case.labels, case.pairs, impl=loss_impl, omega=2.0)
    assert out.loss.requires_grad
    assert not out.ar.requires_grad
    assert not out.consistency.requires_grad
    torch.testing.assert_close(out.loss.detach(), out.ar + 2.0 * out.consistency)


def test_omega_as_a_tensor(loss_impl: LossImpl) -> None:
    leaves = CASE.leaves()
    expected = torch.autograd.grad(loss(leaves, loss_impl), leaves)
    actual = torch.autograd.grad(loss(leaves, loss_impl, omega=torch.tensor(2.0)), leaves)
    assert all(map(torch.equal, actual, expected))


def test_no_tensor_is_read_by_the_host_before_the_operation() -> None:
    """Fake tensors have no values: what asks for one fails, as it would wait for a GPU."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        target, draft, weight = (torch.empty(n, 12, requires_grad=True) for n in (10, 20, 60))
        labels, pairs = (torch.empty(n, dtype=torch.int64) for n in (10, 20))
        scalars = {name: torch.empty(()) for name in ("omega", "ar_denominator", "consistency_denominator")}
        out = consistency_loss(target, draft, weight, labels, pairs, **scalars)
        out.loss.backward()
        assert weight.grad is not None
        with pytest.raises(DataDependentOutputException):
            float(out.loss.detach())


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_and_adapters(tied: bool, loss_impl: LossImpl) -> None:
    """A head that is also the embedding gets both gradients; a low-rank head gets its factors'."""
    matrix = CASE.weight.clone().requires_grad_()
    a, b = torch.randn(60, 2, requires_grad=True), torch.randn(2, 12, requires_grad=True)
    ids = torch.arange(10) * 5
    head = matrix if tied else matrix.detach() + a @ b
    parameters = [matrix] if tied else [a, b]
    hidden = matrix[ids] if tied else CASE.target
    grads = torch.autograd.grad(loss([hidden * 2, CASE.draft, head], loss_impl), parameters)
    leaves = [(hidden * 2).detach().requires_grad_(), CASE.draft, head.detach().requires_grad_()]
    g_hidden, g_head = torch.autograd.grad(loss(leaves, loss_impl), [leaves[0], leaves[2]])
    expected = [g_head.index_add(0, ids, 2 * g_hidden)] if tied else [g_head @ b.T, a.T @ g_head]
    for actual, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, e, rtol=1e-4, atol=1e-4)


def test_mixed_dtypes_take_the_wider(loss_impl: LossImpl) -> None:
    case = CASE.cast(torch.bfloat16)
    leaves = [t.detach().requires_grad_() for t in (case.target, case.draft, case.weight.float())]
    grads = torch.autograd.grad(loss(leaves, loss_impl), leaves)
    wide = [t.detach().float().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(loss(wide, loss_impl), wide)
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for actual, e in zip(grads, expected, strict=True):
        assert torch.equal(actual, e.to(actual.dtype))


def test_autocast(loss_impl: LossImpl) -> None:
    leaves = CASE.leaves()[:3]
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(leaves, loss_impl)
    low = [t.detach().bfloat16().requires_grad_() for t in leaves]
    expected = loss(low, loss_impl)
    assert value.dtype is torch.float32
    assert torch.equal(value, expected)
    for actual, e in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, low), strict=True):
        assert actual.dtype is torch.float32
        assert torch.equal(actual, e.float())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool, loss_impl: LossImpl) -> None:
    leaves = CASE.leaves()
    expected = torch.autograd.grad(loss(leaves, loss_impl), leaves)
    checkpoint(lambda *tensors: loss(list(tensors), loss_impl), *leaves, use_reentrant=use_reentrant).backward()
    for leaf, e in zip(leaves, expected, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, e)


def test_compiled_without_breaks_for_any_number_of_rows(loss_impl: LossImpl) -> None:
    frames = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal frames
        frames += 1
        return graph

    def step(target: Tensor, draft: Tensor, weight: Tensor, labels: Tensor, pairs: Tensor) -> Tensor:
        out = consistency_loss(target * 1.5, draft, weight, labels, pairs, omega=2.0, impl=loss_impl, return_stats=True)
        assert out.stats is not None
        return out.loss * 0.5 + out.stats.entropy.mean()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    aot = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (9, 17, 33):
        case = random_case(m, 2, 12, 60)
        leaves = case.leaves()
        expected = torch.autograd.grad(step(*leaves, case.labels, case.pairs), leaves)
        for function in (compiled, aot):
            actual = torch.autograd.grad(function(*leaves, case.labels, case.pairs), leaves)
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e)
    assert frames == 1


def test_the_registration_is_sound() -> None:
    """Schema, fake implementation and autograd agree with what the operation does."""
    operation = torch.ops.diffpo_engine.consistency_loss.default
    leaves = CASE.leaves()
    arguments = (
        *leaves, CASE.labels, CASE.pairs, torch.tensor(2.0), None, None, None, None, -100, None, 1.0, False, "auto", 0.0,
        "torch", False, True, True, True, True, True,
    )  # fmt: skip
    torch.library.opcheck(
        operation, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_module_form(loss_impl: LossImpl) -> None:
    module = ConsistencyLoss(omega=2.0, softcap=5.0, impl=loss_impl)
    assert not list(module.parameters())
    assert "softcap=5.0" in repr(module)
    out = module(CASE.target, CASE.draft, CASE.weight, CASE.labels, CASE.pairs, bias=CASE.bias)
    assert torch.equal(out.loss, loss(CASE.leaves(), loss_impl, softcap=5.0).detach())
