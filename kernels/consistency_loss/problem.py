"""What every implementation of the consistency loss is given, and what it gives back."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Problem:
    target_hidden: Tensor
    draft_hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    pair_index: Tensor
    ce_scale: Tensor
    kl_scale: Tensor
    softcap: float | None
    temperature: float
    filter_eps: float
    plan: str


@dataclass(frozen=True, slots=True)
class Needs:
    target: bool
    draft: bool
    weight: bool
    bias: bool
    stats: bool


@dataclass(frozen=True, slots=True)
class LossStats:
    lse: Tensor
    entropy: Tensor
    argmax_agrees: Tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    cross_entropy: Tensor
    divergence: Tensor
    grad_target: Tensor | None
    grad_draft: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    stats: LossStats | None
