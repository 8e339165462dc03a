"""What every implementation of the consistency loss is given and what it returns.

Masks, denominators, weights of rows and the place of omega are resolved before, into one scale per row; an
implementation is a function ``loss_and_gradients(p: Problem, needs: Needs) -> Outcome``.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Problem:
    """sum_i ce_scale[i] * CE_i + sum_r kl_scale[r] * KL_r over m target rows and r draft rows."""

    target_hidden: Tensor
    """[m, d] float32, bfloat16 or float16 (the reference also takes float64), contiguous."""
    draft_hidden: Tensor
    """[r, d], same dtype."""
    weight: Tensor
    """[v, d], same dtype."""
    bias: Tensor | None
    """[v], same dtype."""
    labels: Tensor
    """[m] int64 in 0 .. v - 1; 0 where a row has no cross entropy."""
    pair_index: Tensor
    """[r] int64 in -1 .. m - 1: the target row that teaches a draft row; -1: no divergence."""
    ce_scale: Tensor
    """[m] float32 (float64 with float64 inputs); 0 where a row has no cross entropy."""
    kl_scale: Tensor
    """[r] float32 (float64 with float64 inputs), omega included; 0 where a row has no divergence."""
    softcap: float | None
    """logits = softcap * tanh(z / softcap) before anything else."""
    temperature: float
    """Of the divergence only: softmax(logits / temperature), times temperature ** 2 (Hinton et al. 2015)."""
    filter_eps: float
    """Of the sparse plan: the largest share of the magnitudes of a row of dL/dlogits that may be left out of its gradients; 0:
    nothing, as in the other plans."""
    plan: str
    """``dense``, ``recompute`` or ``sparse``, as far as the implementation offers it."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Which results are wanted besides the losses."""

    target: bool
    draft: bool
    weight: bool
    bias: bool
    stats: bool

    @property
    def gradients(self) -> bool:
        """Whether any gradient is wanted."""
        return self.target or self.draft or self.weight or self.bias


@dataclass(frozen=True, slots=True)
class LossStats:
    """By-products of the pass, of the soft-capped logits at temperature 1; target rows first, then draft rows."""

    lse: Tensor
    """[m + r] float32: log of the sum of exponentials."""
    entropy: Tensor
    """[m + r] float32, in nats."""
    argmax_agrees: Tensor
    """[r] bool: the draft row's largest logit is at its teacher's index; False without a teacher."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Losses of the rows, unscaled, and gradients of the scaled sum."""

    cross_entropy: Tensor
    """[m] float32 (float64 with float64 inputs), 0 where ce_scale is 0."""
    divergence: Tensor
    """[r] float32 (float64 with float64 inputs), 0 where pair_index is -1."""
    grad_target: Tensor | None
    """[m, d] in the dtype of the hidden states: accumulated in float32, rounded once. So are the others."""
    grad_draft: Tensor | None
    """[r, d]."""
    grad_weight: Tensor | None
    """[v, d]."""
    grad_bias: Tensor | None
    """[v]."""
    stats: LossStats | None
