"""The operation as torch.library knows it: losses and gradients in the forward, a multiplication in the backward."""

from typing import Any

import torch
from torch import Tensor

from engine.kernels.consistency_loss.dispatch import solve
from engine.kernels.consistency_loss.inputs import build_terms
from engine.kernels.consistency_loss.problem import Needs, Outcome, Problem

GRADIENTS = slice(3, 7)  # of target_hidden, draft_hidden, weight, bias among the results


@torch.library.custom_op("diffpo_engine::consistency_loss", mutates_args=())
def registered(
    target_hidden: Tensor, draft_hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
    pair_index: Tensor, omega: Tensor, label_weights: Tensor | None, pair_weights: Tensor | None,
    ar_denominator: Tensor | None, consistency_denominator: Tensor | None, ignore_index: int, softcap: float | None,
    temperature: float, per_vocabulary: bool, plan: str, filter_eps: float, impl: str, skip_drafts: bool,
    wants_target: bool, wants_draft: bool, wants_weight: bool, wants_bias: bool, wants_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss, ar, consistency, four gradients, lse, entropy, argmax_agrees; what is not wanted is empty."""
    needs = Needs(wants_target, wants_draft, wants_weight, wants_bias, wants_stats)
    m, r = target_hidden.shape[0], draft_hidden.shape[0]
    kept = 0 if (skip_drafts or m == 0) and not wants_stats else r
    if skip_drafts:
        pair_index = torch.full_like(pair_index, -1)
    with torch.autocast(target_hidden.device.type, enabled=False):
        terms = build_terms(
            target_hidden, draft_hidden, weight, bias, labels, pair_index, omega, label_weights, pair_weights,
            ar_denominator, consistency_denominator, ignore_index, softcap, temperature, per_vocabulary, plan, filter_eps,
        )  # fmt: skip
        p = terms.problem if kept == r else _without_drafts(terms.problem)
        outcome = solve(p, needs, impl)
        ar = (p.ce_scale * outcome.cross_entropy).sum()
        consistency = (terms.pair_scale[:kept] * outcome.divergence).sum()
        loss = ar + (p.kl_scale * outcome.divergence).sum()
    target, draft, head, head_bias = _gradients(outcome, draft_hidden)
    return loss, ar, consistency, target, draft, head, head_bias, *_stats(outcome, target_hidden)


def _without_drafts(p: Problem) -> Problem:
    return Problem(
        p.target_hidden, p.draft_hidden[:0], p.weight, p.bias, p.labels, p.pair_index[:0], p.ce_scale, p.kl_scale[:0],
        p.softcap, p.temperature, p.filter_eps, p.plan,
    )  # fmt: skip


def _gradients(outcome: Outcome, draft_hidden: Tensor) -> list[Tensor]:
    draft = outcome.grad_draft
    if draft is not None and draft.shape != draft_hidden.shape:
        draft = torch.zeros_like(draft_hidden, memory_format=torch.contiguous_format)
    grads = (outcome.grad_target, draft, outcome.grad_weight, outcome.grad_bias)
    return [draft_hidden.new_empty(0) if grad is None else grad for grad in grads]


def _stats(outcome: Outcome, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if outcome.stats is None:
        return like.new_empty(0), like.new_empty(0), like.new_empty(0, dtype=torch.bool)
    return outcome.stats.lse, outcome.stats.entropy, outcome.stats.argmax_agrees


@registered.register_fake
def _shapes(
    target_hidden: Tensor, draft_hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    wants = rest[-5:]
    dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    scalars = [weight.new_empty((), dtype=dtype) for _ in range(3)]
    sources = (target_hidden, draft_hidden, weight, bias)
    grads = [
        source.new_empty(source.shape) if wanted and source is not None else weight.new_empty(0)
        for wanted, source in zip(wants, sources, strict=False)
    ]
    rows, pairs = target_hidden.shape[0] + draft_hidden.shape[0], draft_hidden.shape[0]
    if not wants[-1]:
        return *scalars, *grads, weight.new_empty(0), weight.new_empty(0), weight.new_empty(0, dtype=torch.bool)
    by_row = [weight.new_empty(rows, dtype=dtype) for _ in range(2)]
    return *scalars, *grads, *by_row, weight.new_empty(pairs, dtype=torch.bool)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[GRADIENTS])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else autograd makes zeros of the size of W for the outputs without a gradient
    ctx.wants = inputs[-5:-1]
    ctx.inputs = len(inputs)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "consistency_loss cannot be differentiated twice: its gradients are taken in the forward pass; call backward "
            "without create_graph=True, or use engine.kernels.consistency_loss.reference.losses, which is plain PyTorch"
        )
    if grad is None:
        return (None,) * ctx.inputs
    saved = ctx.saved_tensors
    grads = [_scaled(g, grad) if wanted else None for g, wanted in zip(saved, ctx.wants, strict=True)]
    return *grads, *[None] * (ctx.inputs - len(grads))


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor, in place where nobody will ask for it again: a copy of W's gradient can be gigabytes."""
    if torch.compiler.is_compiling() or type(gradient) is not Tensor or _graph_is_kept():
        return (gradient * factor).to(gradient.dtype)
    if factor.is_cpu and factor.item() == 1:
        return gradient
    return gradient.mul_(factor)


def _graph_is_kept() -> bool:
    # A private name, the only way to learn of retain_graph=True; without it the safe answer is yes.
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else asked()


registered.register_autograd(_backward, setup_context=_setup_context)
