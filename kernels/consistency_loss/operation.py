"""The consistency loss as one differentiable operation: cross entropy of the target + omega * KL of the drafts."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.kernels.consistency_loss.inputs import (
    check_optional_tensors,
    check_options,
    check_tensors,
    denominator,
    scalar,
)
from engine.kernels.consistency_loss.problem import LossStats
from engine.kernels.consistency_loss.registration import registered

LossImpl = Literal["auto", "torch", "cpp", "triton"]
Plan = Literal["auto", "dense", "recompute", "sparse"]
Normalization = Literal["token", "vocabulary"]


@dataclass(frozen=True, slots=True)
class ConsistencyLossOutput:
    """What ``consistency_loss`` returns; only ``loss`` carries a gradient."""

    loss: Tensor
    """ar + omega * consistency, float32 (float64 for float64 inputs), differentiable."""
    ar: Tensor
    """The cross entropy term, detached."""
    consistency: Tensor
    """The divergence term without omega, detached; 0 with ``omega=0.0``, where it is not computed."""
    stats: LossStats | None
    """With ``return_stats=True``."""


def consistency_loss(
    target_hidden: Tensor,
    draft_hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    pair_index: Tensor,
    *,
    omega: float | Tensor = 1e3,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    label_weights: Tensor | None = None,
    pair_weights: Tensor | None = None,
    ar_denominator: float | Tensor | None = None,
    consistency_denominator: float | Tensor | None = None,
    kl_normalization: Normalization = "token",
    plan: Plan = "auto",
    filter_eps: float = 0.0,
    impl: LossImpl = "auto",
    return_stats: bool = False,
) -> ConsistencyLossOutput:
    """Cross entropy of the target rows + omega * KL(teacher || student) of the draft rows (arXiv 2503.04240).

    target_hidden [M, D], draft_hidden [R, D], lm_head_weight [V, D] and ``bias`` [V] float32, bfloat16 or float16 (the
    wider type where they differ, autocast's inside autocast); labels [M] int64 or int32, ``ignore_index`` for a row
    without cross entropy; pair_index [R]: the row of target_hidden that teaches a draft row, -1 for none. The logits
    ``softcap * tanh(z / softcap)`` stay in float32; the teacher gets no gradient through the KL term, nor does the
    weight through the teacher.

    A term is the sum over its rows, times ``label_weights`` [M] or ``pair_weights`` [R] where given, divided by the
    number of rows that have it, or by ``ar_denominator`` / ``consistency_denominator``: with the counts of a whole
    batch in these, the losses of its micro-batches add up to its loss. ``kl_normalization="vocabulary"`` divides the KL by V
    as well, as a framework's "mean" reduction does: the same omega then weighs V times less. ``temperature`` divides
    the logits of both distributions of the KL, which is multiplied by its square (Hinton et al. 2015); the cross
    entropy is that of temperature 1. ``omega=0.0`` skips the drafts; as a tensor omega is never read by the host.

    ``plan="sparse"`` leaves small entries of a row of dL/dlogits out of its gradients, together at most the share
    ``filter_eps`` of the row's sum of magnitudes (0: nothing), and puts approximations in their place: 0.1 cost 2e-3 to
    5e-3 of a gradient's norm on a trained model. Losses and statistics stay exact, as is every other plan; where little
    could be left out, as before training, or without an implementation of it, so is this one. The gradients are taken in
    the forward pass and kept until the backward; without gradients to take there is only the loss.

    In bfloat16 on a CPU that multiplies it, dL/dlogits is rounded to bfloat16 where it is multiplied: 1e-3 to 1.6e-3 of a
    gradient's norm on random inputs, as much as the gradient's own rounding. On a GPU, products of float32 inputs are
    PyTorch's and follow ``torch.set_float32_matmul_precision``, as those of its own layers do. "high" keeps 10 bits of
    every factor: inputs rounded so put the cross entropy off by 5e-5, a target's gradient by 2e-4 and a draft's by 1e-3
    to 3e-2, most where it nearly agrees with its teacher (computed on a CPU). Only "highest", the default, has float32's
    accuracy. ``plan="auto"`` takes "dense" or, where memory is short, "recompute"; while a CUDA graph is captured always
    "dense": name the plan where one is, so that the warm-up runs the same.
    """
    check_tensors(target_hidden, draft_hidden, lm_head_weight, labels, pair_index)
    check_optional_tensors(target_hidden, draft_hidden, lm_head_weight, bias, label_weights, pair_weights)
    check_options(softcap, temperature, kl_normalization, plan, filter_eps, impl)
    target, draft, weight, bias = _common_dtype(target_hidden, draft_hidden, lm_head_weight, bias)
    taking = torch.is_grad_enabled()
    wants = [taking and tensor is not None and tensor.requires_grad for tensor in (target, draft, weight, bias)]
    loss, ar, consistency, _, _, _, _, *stats = registered(
        target, draft, weight, bias, labels, pair_index, scalar("omega", omega, target), label_weights, pair_weights,
        denominator("ar_denominator", ar_denominator, target),
        denominator("consistency_denominator", consistency_denominator, target), ignore_index, softcap, temperature,
        kl_normalization == "vocabulary", plan, filter_eps, impl, not isinstance(omega, Tensor) and omega == 0,
        *wants, return_stats,
    )  # fmt: skip
    return ConsistencyLossOutput(loss, ar, consistency, LossStats(*stats) if return_stats else None)


def _common_dtype(
    target: Tensor, draft: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The casts are differentiable: every gradient comes back in the dtype of its own tensor."""
    device = target.device.type
    if torch.is_autocast_enabled(device) and weight.dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(torch.promote_types(target.dtype, draft.dtype), weight.dtype)
        dtype = dtype if bias is None else torch.promote_types(dtype, bias.dtype)
    return target.to(dtype), draft.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
