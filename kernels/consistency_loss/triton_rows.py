"""Which rows are worked on together, and where their results go.

A chunk holds target rows with the draft rows they teach: its drafts find their teacher's logits beside their own, and a
target's logits are computed once for all of its drafts (again only where more drafts than a chunk holds have one teacher).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.consistency_loss.problem import LossStats, Needs, Outcome, Problem


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows in the order: drafts that nobody teaches, targets without a cross entropy, the other targets, drafts."""

    alone: Tensor
    """[n] int64 row of draft_hidden, wanted for the statistics only."""
    silent: Tensor
    """[n] int64 row of target_hidden: teachers whose own gradient is not wanted here."""
    voiced: Tensor
    """[n] int64 row of target_hidden: rows with a cross entropy."""
    drafts: Tensor
    """[n] int64 row of draft_hidden."""
    first: Tensor
    """[rows before the drafts] int64: the first row of this chunk that the row teaches."""
    last: Tensor
    """The row behind its last one."""
    teacher: Tensor
    """[drafts] int64: its teacher's row of this chunk."""

    @property
    def without_gradient(self) -> int:
        return self.alone.numel() + self.silent.numel()

    @property
    def heads(self) -> int:
        """Rows before the drafts."""
        return self.first.numel()

    @property
    def rows(self) -> int:
        return self.heads + self.drafts.numel()

    def rows_wanted(self, needs: Needs) -> slice:
        """Of the rows with a gradient, those whose own gradient is wanted."""
        voiced, rows = self.voiced.numel(), self.rows - self.without_gradient
        return slice(0 if needs.target else voiced, rows if needs.draft else voiced)

    def hidden(self, p: Problem) -> Tensor:
        parts = [p.draft_hidden[self.alone], p.target_hidden[self.silent], p.target_hidden[self.voiced]]
        return torch.cat([*parts, p.draft_hidden[self.drafts]])

    def labels(self, p: Problem) -> Tensor:
        """[heads] int64; of rows without a cross entropy any label will do."""
        return torch.cat([torch.zeros_like(self.alone), p.labels[self.silent], p.labels[self.voiced]])

    def scale(self, p: Problem) -> Tensor:
        """[rows] float32: what a row's difference of probabilities is multiplied by."""
        zeros = p.ce_scale.new_zeros(self.without_gradient)
        return torch.cat([zeros, p.ce_scale[self.voiced], p.kl_scale[self.drafts] * p.temperature])

    def ids(self, p: Problem) -> Tensor:
        """[rows] int64: index among the targets, then the drafts."""
        m = p.target_hidden.shape[0]
        return torch.cat([self.alone + m, self.silent, self.voiced, self.drafts + m])


def chunks(p: Problem, needs: Needs, capacity: int) -> list[Chunk]:
    """Of at most ``capacity`` rows, without the rows that no result depends on.

    To leave rows out costs one synchronisation; a CUDA graph cannot have it and gets all of them, teachers twice.
    """
    if p.target_hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        return list(static_chunks(p, capacity))
    m, r = p.labels.numel(), p.pair_index.numel()
    pair, has_ce = torch.cat([p.pair_index, (p.ce_scale != 0).long()]).cpu().split([r, m])
    plan = _planned(pair, has_ce.bool(), needs.stats, max(2, capacity))
    if not plan:
        return []
    there = torch.cat([part for parts in plan for part in parts]).to(p.labels.device)
    pieces = iter(there.split([part.numel() for parts in plan for part in parts]))
    return [Chunk(*(next(pieces) for _ in parts)) for parts in plan]


def static_chunks(p: Problem, capacity: int) -> Iterator[Chunk]:
    """All rows, planned from the shapes alone: targets on their own, then drafts with a copy of their teachers."""
    m, r = p.labels.numel(), p.pair_index.numel()
    if capacity >= m + r:
        yield _static_chunk(p, slice(0, m), slice(0, r if m else 0))
        return
    for start in range(0, m, capacity):
        yield _static_chunk(p, slice(start, start + capacity), slice(0))
    half = max(1, capacity // 2)
    for start in range(0, r if m else 0, half):
        yield _static_chunk(p, slice(0), slice(start, start + half))


def _static_chunk(p: Problem, targets: slice, drafts: slice) -> Chunk:
    """A draft without a teacher is taught by row 0, to no effect: its scale is zero."""
    pair = p.pair_index[drafts]
    rows = torch.arange(p.labels.numel() + p.pair_index.numel(), device=pair.device)
    voiced, own = rows[: p.labels.numel()][targets], rows[: p.pair_index.numel()][drafts]
    teacher = rows[: own.numel()]
    first = torch.cat([teacher, torch.full_like(voiced, own.numel())]) + own.numel() + voiced.numel()
    taught = torch.cat([torch.ones_like(teacher), torch.zeros_like(voiced)])
    return Chunk(rows[:0], pair.clamp_min(0), voiced, own, first, first + taught, teacher)


def _planned(pair: Tensor, has_ce: Tensor, stats: bool, capacity: int) -> list[tuple[Tensor, ...]]:
    m = has_ce.numel()
    drafts = (pair >= 0).nonzero().flatten()
    drafts = drafts[pair[drafts].argsort(stable=True)]
    taught = torch.bincount(pair[drafts], minlength=m)
    heads = (has_ce | (taught > 0) | stats).nonzero().flatten()
    # a target with more drafts than fit is a head in several chunks, with its cross entropy in the first
    parts = (-(-taught[heads] // (capacity - 1))).clamp_min(1)
    heads = heads.repeat_interleave(parts)
    part = torch.arange(heads.numel()) - (parts.cumsum(0) - parts).repeat_interleave(parts)
    size = (taught[heads] - part * (capacity - 1)).clamp_max(capacity - 1)
    kind = torch.where(has_ce[heads] & (part == 0), 2, 1)
    if stats:
        alone = (pair < 0).nonzero().flatten()
        heads = torch.cat([heads, alone + m])
        size, kind = torch.cat([size, torch.zeros_like(alone)]), torch.cat([kind, torch.zeros_like(alone)])
    end, drafts_end = (size + 1).cumsum(0), size.cumsum(0)
    plan: list[tuple[Tensor, ...]] = []
    for a, b in _cuts(end, size + 1, capacity):
        begin = int(drafts_end[a] - size[a])
        order = kind[a:b].argsort(stable=True) + a
        first = drafts_end[order] - size[order] - begin + (b - a)
        alone, silent, voiced = (heads[order[kind[order] == k]] for k in (0, 1, 2))
        own = drafts[begin : int(drafts_end[b - 1])]
        teacher = torch.empty(own.numel(), dtype=torch.int64)
        teacher[_ranges(first - (b - a), size[order])] = torch.arange(b - a).repeat_interleave(size[order])
        plan.append((alone - m, silent, voiced, own, first, first + size[order], teacher))
    return plan


def _cuts(end: Tensor, cost: Tensor, capacity: int) -> Iterator[tuple[int, int]]:
    """Consecutive heads of about equal cost, each part at most ``capacity``."""
    if not end.numel():
        return
    count = -(-int(end[-1]) // capacity)
    limit = max(-(-int(end[-1]) // count), int(cost.max()))
    start = 0
    while start < end.numel():
        before = int(end[start] - cost[start])
        stop = int(torch.searchsorted(end, torch.tensor(before + limit), right=True))
        yield start, stop
        start = stop


def _ranges(first: Tensor, size: Tensor) -> Tensor:
    """first[0] .. first[0] + size[0] - 1, then those of the next."""
    within = torch.arange(int(size.sum())) - (size.cumsum(0) - size).repeat_interleave(size)
    return first.repeat_interleave(size) + within


class Results:
    """The tensors of an Outcome while they are filled, chunk by chunk."""

    def __init__(self, p: Problem, needs: Needs) -> None:
        self.p, self.needs = p, needs
        m, r, device = p.labels.numel(), p.pair_index.numel(), p.labels.device
        self.cross_entropy = torch.zeros(m, dtype=torch.float32, device=device)
        self.divergence = torch.zeros(r, dtype=torch.float32, device=device)
        self.grad_target = torch.zeros_like(p.target_hidden) if needs.target else None
        self.grad_draft = torch.zeros_like(p.draft_hidden) if needs.draft else None
        self.stats = None
        if needs.stats:
            lse, entropy = torch.zeros(2, m + r, dtype=torch.float32, device=device)
            self.stats = LossStats(lse, entropy, torch.zeros(r, dtype=torch.bool, device=device))

    def write_losses(self, chunk: Chunk, sums: Tensor, divergence: Tensor) -> None:
        """From ``combined`` sums of all rows and the divergence of the drafts, at temperature 1."""
        p = self.p
        maximum, log_total, _, entropy, label, best = sums
        voiced = slice(chunk.without_gradient, chunk.heads)
        cross_entropy = ((maximum - label) + log_total)[voiced]
        # static chunks hold rows without a term too
        self.cross_entropy.index_copy_(0, chunk.voiced, torch.where(p.ce_scale[chunk.voiced] != 0, cross_entropy, 0.0))
        divergence = torch.where(p.pair_index[chunk.drafts] >= 0, divergence * p.temperature**2, 0.0)
        self.divergence.index_copy_(0, chunk.drafts, divergence)
        if self.stats is not None:
            ids = chunk.ids(p)
            self.stats.lse.index_copy_(0, ids, maximum + log_total)
            self.stats.entropy.index_copy_(0, ids, entropy)
            agrees = (best[chunk.heads :] == best[chunk.teacher]) & (p.pair_index[chunk.drafts] >= 0)
            self.stats.argmax_agrees.index_copy_(0, chunk.drafts, agrees)

    def write_hidden(self, chunk: Chunk, wanted: slice, gradient: Tensor, scale: Tensor | None) -> None:
        """``gradient`` [rows wanted, d] float32, times ``scale``, of the chunk's voiced rows, its drafts or both."""
        if scale is not None:
            gradient = gradient.div_(scale)
        voiced = chunk.voiced.numel() - wanted.start
        for whole, rows, part in (
            (self.grad_target, chunk.voiced, gradient[:voiced]),
            (self.grad_draft, chunk.drafts, gradient[voiced:]),
        ):
            if whole is not None:
                whole.index_copy_(0, rows, part.to(whole.dtype))

    def outcome(self, grad_weight: Tensor | None, grad_bias: Tensor | None) -> Outcome:
        return Outcome(
            self.cross_entropy, self.divergence, self.grad_target, self.grad_draft, grad_weight, grad_bias, self.stats
        )
