"""The consistency loss in plain PyTorch: what every other implementation must compute (arXiv 2503.04240)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.consistency_loss.problem import LossStats, Needs, Outcome, Problem


def losses(p: Problem) -> tuple[Tensor, Tensor]:
    """Cross entropy [m] and divergence [r] of every row, unscaled; differentiable by autograd."""
    (s_target, _), (s_draft, _) = _logits(p, p.target_hidden), _logits(p, p.draft_hidden)
    tau = p.temperature
    cross_entropy = F.cross_entropy(s_target, p.labels, reduction="none")
    # Teacher and student share their weights; the paper stops the gradient at the teacher's distribution.
    teacher = (s_target.detach() / tau).log_softmax(-1)[p.pair_index.clamp_min(0)]
    divergence = _divergence(teacher, (s_draft / tau).log_softmax(-1)) * tau**2
    return cross_entropy.where(p.ce_scale != 0, 0), divergence.where(p.pair_index >= 0, 0)


def loss_and_gradients(p: Problem, needs: Needs) -> Outcome:
    """The losses and their gradients, written out: autograd is off inside a registered operation."""
    cross_entropy, divergence = losses(p)
    (s_target, slope_target), (s_draft, slope_draft) = _logits(p, p.target_hidden), _logits(p, p.draft_hidden)
    grads: tuple[Tensor | None, ...] = (None, None, None, None)
    if needs.gradients:
        tau, teachers = p.temperature, p.pair_index.clamp_min(0)
        one_hot = F.one_hot(p.labels, s_target.shape[1])
        g_target = (s_target.softmax(-1) - one_hot) * p.ce_scale[:, None]
        g_draft = (s_draft / tau).softmax(-1) - (s_target / tau).softmax(-1)[teachers]
        g_draft = g_draft * (p.kl_scale * tau)[:, None]
        # a row without a term has no gradient, whatever its logits are
        g_target = (g_target * slope_target).where(p.ce_scale[:, None] != 0, 0)
        g_draft = (g_draft * slope_draft).where(p.kl_scale[:, None] != 0, 0)
        wide, dtype = s_target.dtype, p.weight.dtype
        hidden = torch.cat((p.target_hidden, p.draft_hidden)).to(wide)
        g = torch.cat((g_target, g_draft))
        weight = p.weight.to(wide)
        grads = (
            (g_target @ weight).to(dtype) if needs.target else None,
            (g_draft @ weight).to(dtype) if needs.draft else None,
            (g.T @ hidden).to(dtype) if needs.weight else None,
            g.sum(0).to(dtype) if needs.bias else None,
        )
    stats = _stats(p, s_target, s_draft) if needs.stats else None
    return Outcome(cross_entropy, divergence, grads[0], grads[1], grads[2], grads[3], stats)


def _logits(p: Problem, hidden: Tensor) -> tuple[Tensor, Tensor | float]:
    """Logits [rows, v] behind the soft-cap, and its slope there."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    z = F.linear(hidden.to(wide), p.weight.to(wide), None if p.bias is None else p.bias.to(wide))
    if not p.softcap:
        return z, 1.0
    t = torch.tanh(z / p.softcap)
    return p.softcap * t, 1 - t * t


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of log probabilities [r, v] -> [r]; 0 log 0 is 0."""
    p, q = teacher.exp(), student.exp()
    # q - p adds up to nothing, but leaves squares of small differences where the streams agree, not their rounding.
    return (p * (teacher - student) + (q - p)).where(p != 0, q).sum(-1)


def _stats(p: Problem, s_target: Tensor, s_draft: Tensor) -> LossStats:
    log_p = torch.cat((s_target, s_draft)).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).where(log_p > -torch.inf, 0).sum(-1)
    lse = torch.cat((s_target.logsumexp(-1), s_draft.logsumexp(-1)))
    best = s_target.argmax(-1)[p.pair_index.clamp_min(0)]
    return LossStats(lse, entropy, (s_draft.argmax(-1) == best) & (p.pair_index >= 0))
