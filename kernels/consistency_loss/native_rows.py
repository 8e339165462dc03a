"""Rows of the consistency loss on a CPU: which of them work together, what they carry, where their results go."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.consistency_loss.problem import LossStats, Needs, Outcome, Problem
from engine.kernels.native import new_output

STATE = 8  # float64 of a row; LossState in csrc/kernels.h
LARGEST, SUM, _, PICKED, BEST, DIVERGENCE, ENTROPY, _ = range(STATE)


def groups(
    p: Problem, needs: Needs, first: int, limit: int, spread: bool = False
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows of targets, rows of their drafts, and each draft's place among the targets; rows without a term are left out.

    A group has at most ``limit`` rows, the first one at most ``first``; a target and its drafts stay together. ``spread``: the
    first group's are spread over all targets, where neighbours are of one answer and may be unlike the others.
    """
    paired = p.pair_index >= 0
    drafts = (paired | needs.stats).nonzero().flatten()
    teacher = p.pair_index[drafts].clamp_min(0)
    drafts = drafts[teacher.argsort(stable=True)]
    teacher = p.pair_index[drafts].clamp_min(0)
    taught = torch.bincount(teacher, minlength=len(p.labels))
    used = (p.ce_scale != 0) | (taught > 0) | needs.stats
    targets = used.nonzero().flatten()
    if len(targets) == 0:
        return []
    sizes = 1 + taught[targets]
    group = _fill(sizes.tolist(), first, limit, spread)
    place = used.cumsum(0) - 1
    of_draft = group[place[teacher]]
    out = []
    for g in range(int(group.max()) + 1):
        mine, theirs = (group == g).nonzero().flatten(), (of_draft == g).nonzero().flatten()
        out.append((targets[mine], drafts[theirs], torch.searchsorted(mine, place[teacher[theirs]])))
    return out


def _fill(sizes: list[int], first: int, limit: int, spread: bool) -> Tensor:
    """Number of the group of every target: as many as fit under the limit (``first``: of group 0), at least one."""
    chosen = _spread(sizes, first) if spread else set()
    numbers, number, held = [0] * len(sizes), int(spread), 0
    for i, size in enumerate(sizes):
        if i in chosen:
            continue
        if held and held + size > (limit if number else first):
            number, held = number + 1, 0
        held += size
        numbers[i] = number
    return torch.tensor(numbers)


def _spread(sizes: list[int], limit: int) -> set[int]:
    """Targets at equal distances that have about ``limit`` rows together, never more unless it is one target."""
    count = max(1, min(len(sizes), limit * len(sizes) // sum(sizes)))
    chosen, held = set[int](), 0
    for i in (k * len(sizes) // count for k in range(count)):
        if not chosen or held + sizes[i] <= limit:
            chosen.add(i)
            held += sizes[i]
    return chosen


@dataclass(frozen=True, slots=True)
class Group:
    """Target rows, then the draft rows that they teach."""

    targets: Tensor
    drafts: Tensor
    teachers: Tensor
    """[drafts] rows of the group."""
    hidden: Tensor
    """[rows, d] float32."""
    gradient: Tensor
    """[rows, d] float32, or [0, d]."""
    labels: Tensor
    scale: Tensor
    state: Tensor
    """[rows, STATE] float64."""

    @classmethod
    def gather(cls, p: Problem, needs: Needs, targets: Tensor, drafts: Tensor, teachers: Tensor) -> "Group":
        h_target, h_draft = p.target_hidden[targets], p.draft_hidden[drafts]
        own = torch.arange(len(drafts)) + len(targets)
        # A BLAS may add up equal rows differently where they lie elsewhere: such a row stands in for its teacher.
        alone = (h_draft == h_target[teachers]).all(-1) | (p.pair_index[drafts] < 0)
        hidden = torch.cat((h_target.float(), h_draft.float()))
        state = torch.zeros(len(hidden), STATE, dtype=torch.float64)
        state[:, LARGEST] = -torch.inf
        gradient = torch.zeros(len(hidden) if needs.target or needs.draft else 0, hidden.shape[1])
        scale = torch.cat((p.ce_scale[targets], p.kl_scale[drafts]))
        return cls(
            targets, drafts, teachers.where(~alone, own), hidden, gradient, p.labels[targets].contiguous(), scale, state
        )


@dataclass(frozen=True, slots=True)
class Results:
    cross_entropy: Tensor
    divergence: Tensor
    grad_target: Tensor | None
    grad_draft: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    stats: LossStats | None

    @classmethod
    def allocate(cls, p: Problem, needs: Needs, covered: int) -> "Results":
        m, r = len(p.labels), len(p.pair_index)
        # rows that no group covers have no gradient
        new = torch.empty_like if covered == m + r else torch.zeros_like
        stats = None
        if needs.stats:
            stats = LossStats(new_output(m + r), new_output(m + r), new_output(r, dtype=torch.bool))
        weight = None
        if needs.weight:
            weight = torch.empty_like(p.weight) if covered else torch.zeros_like(p.weight)
        return cls(
            torch.zeros(m), torch.zeros(r), new(p.target_hidden) if needs.target else None,
            new(p.draft_hidden) if needs.draft else None, weight,
            torch.zeros(len(p.weight)) if needs.bias else None, stats,
        )  # fmt: skip

    def finish(self, p: Problem, group: Group) -> None:
        """Puts a group's results where its rows belong."""
        state, count, m = group.state, len(group.targets), len(p.labels)
        lse = state[:, LARGEST] + state[:, SUM].log()
        cross_entropy = (lse - state[:, PICKED] * (p.softcap or 1.0))[:count].where(group.scale[:count] != 0, 0)
        self.cross_entropy[group.targets] = cross_entropy.float()
        self.divergence[group.drafts] = (state[count:, DIVERGENCE] * p.temperature**2).float()
        if self.grad_target is not None:
            self.grad_target[group.targets] = group.gradient[:count].to(p.weight.dtype)
        if self.grad_draft is not None:
            self.grad_draft[group.drafts] = group.gradient[count:].to(p.weight.dtype)
        if self.stats is not None:
            rows = torch.cat((group.targets, m + group.drafts))
            self.stats.lse[rows], self.stats.entropy[rows] = lse.float(), state[:, ENTROPY].float()
            self.stats.argmax_agrees[group.drafts] = state[count:, BEST] == state[group.teachers, BEST]

    def outcome(self, p: Problem) -> Outcome:
        divergence = self.divergence.where(p.pair_index >= 0, 0)
        if self.stats is not None:
            self.stats.argmax_agrees.logical_and_(p.pair_index >= 0)
        bias = None if self.grad_bias is None else self.grad_bias.to(p.weight.dtype)
        return Outcome(
            self.cross_entropy, divergence, self.grad_target, self.grad_draft, self.grad_weight, bias, self.stats
        )


def blocks(p: Problem, size: int) -> Iterator[slice]:
    v = len(p.weight)
    return (slice(start, min(start + size, v)) for start in range(0, v, size))
