"""Inputs for the consistency loss, its float64 autograd oracle, and how far from it an implementation may be."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.kernels import consistency_loss
from engine.kernels.consistency_loss.operation import LossImpl
from tests.kernels.references import EPSILON, FEW, randn, soft_capped

BOUND = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 2e-3}
"""Relative to the norm of the exact gradient, before the output's own rounding."""
NAMES = ("target_hidden", "draft_hidden", "weight", "bias")


@dataclass(frozen=True)
class Case:
    """Arguments of one call; ``options`` are its keyword arguments."""

    target: Tensor
    draft: Tensor
    weight: Tensor
    labels: Tensor
    pairs: Tensor
    bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def cast(self, dtype: torch.dtype) -> "Case":
        bias = None if self.bias is None else self.bias.to(dtype)
        return dataclasses.replace(
            self, target=self.target.to(dtype), draft=self.draft.to(dtype), weight=self.weight.to(dtype), bias=bias
        )

    def leaves(self) -> list[Tensor]:
        tensors = [self.target, self.draft, self.weight, *([] if self.bias is None else [self.bias])]
        return [t.detach().clone().requires_grad_() for t in tensors]


@dataclass(frozen=True)
class Results:
    loss: Tensor
    ar: Tensor
    consistency: Tensor
    grads: list[Tensor]


def random_case(
    m: int, drafts: int, d: int, v: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, bias: bool = False,
    distance: float = 1.0, ignored: float = 0.3, unpaired: float = 0.2, scale: float = 1.0, **options: Any,
) -> Case:  # fmt: skip
    """``drafts`` rows per target row, at a relative ``distance`` from it, in an order of their own."""
    generator = torch.Generator().manual_seed(seed)
    target = randn(seed, m, d)
    pairs = torch.arange(m).repeat(drafts)[torch.randperm(m * drafts, generator=generator)]
    draft = target[pairs] + distance * randn(seed + 1, m * drafts, d)
    labels = torch.randint(0, v, (m,), generator=generator)
    labels[torch.rand(m, generator=generator) < ignored] = options.get("ignore_index", -100)
    pairs[torch.rand(m * drafts, generator=generator) < unpaired] = -1
    weight = randn(seed + 2, v, d, scale=scale * d**-0.5 * 2)
    case = Case(target, draft, weight, labels, pairs, randn(seed + 3, v) if bias else None, options)
    return case.cast(dtype)


def run(case: Case, impl: LossImpl, **changes: Any) -> Results:
    leaves = case.leaves()
    bias = leaves[3] if case.bias is not None else None
    options = {**case.options, **changes}
    out = consistency_loss(*leaves[:3], case.labels, case.pairs, bias=bias, impl=impl, **options)
    return Results(out.loss.detach(), out.ar, out.consistency, list(torch.autograd.grad(out.loss, leaves)))


def plain(case: Case, dtype: torch.dtype = torch.float64) -> Results:
    """The formulas of METHOD.md through autograd, in ``dtype``."""
    o = case.options
    leaves = case.cast(dtype).leaves()
    bias = leaves[3] if case.bias is not None else 0.0
    s_target, s_draft = (soft_capped(h @ leaves[2].T + bias, o.get("softcap")) for h in leaves[:2])
    labelled, paired = case.labels != o.get("ignore_index", -100), case.pairs >= 0
    of_label = s_target[torch.arange(len(case.labels)), case.labels.long().where(labelled, 0)]
    cross_entropy = (s_target.logsumexp(-1) - of_label)[labelled]
    tau = o.get("temperature", 1.0)
    log_p = (s_target.detach() / tau).log_softmax(-1)[case.pairs[paired].long()]
    log_q = (s_draft / tau).log_softmax(-1)[paired]
    terms = (log_p.exp() * (log_p - log_q)).masked_fill(log_p.exp() == 0, 0)
    divergence = terms.sum(-1) * tau**2
    if o.get("label_weights") is not None:
        cross_entropy = cross_entropy * o["label_weights"].to(dtype)[labelled]
    if o.get("pair_weights") is not None:
        divergence = divergence * o["pair_weights"].to(dtype)[paired]
    ar = cross_entropy.sum() / o.get("ar_denominator", max(1, int(labelled.sum())))
    consistency = divergence.sum() / o.get("consistency_denominator", max(1, int(paired.sum())))
    if o.get("kl_normalization") == "vocabulary":
        consistency = consistency / case.weight.shape[0]
    loss = ar + o.get("omega", 1e3) * consistency
    return Results(loss.detach(), ar.detach(), consistency.detach(), list(torch.autograd.grad(loss, leaves)))


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm())


def rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """What rounding to the output's dtype costs, however exact the computation."""
    return error(exact.to(dtype), exact)


def assert_close(actual: Results, case: Case, *, bounded: bool = True, twice: bool = True) -> None:
    """Within LOSS.md's bounds, and within twice the error of the plain float32 computation, its output rounded too.

    ``bounded=False``: inputs that plain float32 itself misses the bounds on. ``twice=False``: sizes at which a BLAS, which
    adds up in more and shorter chains, is further ahead of a kernel that is within the bounds.
    """
    assert bounded or twice
    exact = plain(case)
    low = plain(case, torch.float32)
    dtype = case.weight.dtype
    for name in ("loss", "ar", "consistency"):
        a, e, l = (getattr(results, name) for results in (actual, exact, low))
        if name == "consistency" and case.options.get("omega") == 0:
            e = l = torch.zeros_like(e)  # skipped
        assert a.dtype is torch.float32
        allowed = 2 * error(l, e) + 8 * FEW * EPSILON * (1 + float(e.abs()))
        assert error(a, e) <= allowed, (name, float(a), float(e), allowed)
    for name, a, e, l in zip(NAMES, actual.grads, exact.grads, low.grads, strict=False):
        assert a.dtype is dtype
        assert a.shape == e.shape
        norm, rounded = float(e.norm()), rounding(e, dtype)
        bounds = {
            "LOSS.md's bound": BOUND[dtype] * norm + rounded if bounded else math.inf,
            "twice plain float32": 2 * (error(l, e) + rounded) if twice else math.inf,
        }
        for bound, allowed in bounds.items():
            assert error(a, e) <= allowed, (
                f"{name}: relative error {error(a, e) / (norm or 1):.3g}, by {bound} {allowed / (norm or 1):.3g}"
            )
