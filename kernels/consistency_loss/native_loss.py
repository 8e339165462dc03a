"""The consistency loss on a CPU: products by PyTorch's BLAS, everything between them in C++, the vocabulary in blocks.

Two passes over the vocabulary: logits and their rows' statistics, then gradients. Between the passes logits wait in the memory
of the head's gradient, a block of them where the same block of the gradient will be written, and what does not fit there in
some of its own. With float32, or where the head needs no gradient, further rows make further groups, which add to the head's
gradient: 6 units of work (of 2 * rows per stream * V * D operations). With 16 bits that would need a float32 copy of the
gradient; there all rows pass over the vocabulary together, each block of the gradient is finished and rounded once, and the
logits that memory has no room for are computed twice: up to 8 units.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.consistency_loss.problem import LossStats, Needs, Outcome, Problem
from engine.kernels.native import Native, address, native, new_output

BLOCK = 2048  # vocabulary rows of one product
ROUNDED_BLOCK = 1024  # the same where all rows make one group: smaller blocks leave room for logits
DEPTH = 128  # products a BLAS adds up in a row: chains of its own choice lose up to a factor 1.6 in the logits and gain no time
KEPT_BYTES = 1.4  # for each row and entry of the vocabulary: logits of a group of rows outside the head's gradient
WORK_BYTES = 1.6  # everything, where all rows make one group; eager PyTorch holds 12 to 13 beyond the gradients
FEW_ROWS = 96  # are not divided further
STATE = 8  # float64 of a row; LossState in csrc/kernels.h
LARGEST, SUM, _, PICKED, BEST, DIVERGENCE, ENTROPY, _ = range(STATE)


def reason_against(p: Problem) -> str | None:
    """Why the C++ implementation cannot take the problem, or None."""
    if not p.weight.is_cpu:
        return f"it needs CPU tensors, got {p.weight.device}"
    if p.weight.dtype is torch.float64:
        return "it needs float32, bfloat16 or float16, got torch.float64"
    if p.plan not in ("auto", "dense"):
        return f'it offers plan="dense", got {p.plan!r}'
    return None if native() else "the C++ extension is not built"


def loss_and_gradients(p: Problem, needs: Needs) -> Outcome:
    """As the reference. A row's bits depend on nothing but the rows of its group; nothing depends on timing."""
    library = native()
    assert library is not None
    groups = _groups(p, needs)
    sizes = [len(targets) + len(drafts) for targets, drafts, _ in groups]
    results = _Results.allocate(p, needs, covered=sum(sizes))
    space = _Workspace.allocate(p, needs, sizes)
    for number, (targets, drafts, teachers) in enumerate(groups):
        group = _Group.gather(p, needs, targets, drafts, teachers)
        places = _Places.choose(space, group, results.grad_weight if number == 0 else None)
        _first_pass(p, group, space, places, library)
        if needs.gradients or needs.stats or len(drafts):
            _second_pass(p, needs, group, space, places, results, library, accumulate=number > 0)
        results.finish(p, group)
    return results.outcome(p)


def _one_group(p: Problem, needs: Needs) -> bool:
    return needs.weight and p.weight.dtype is not torch.float32


def _slot_rows(p: Problem, needs: Needs) -> int:
    """Rows whose float32 logits fit in the memory of the head's gradient."""
    return p.weight.shape[1] * p.weight.element_size() // 4 if needs.weight else 0


def _kept_rows(p: Problem) -> int:
    rows = len(p.labels) + len(p.pair_index)
    return max(FEW_ROWS, int(KEPT_BYTES * rows / 4))


def _groups(p: Problem, needs: Needs) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows of targets, rows of their drafts, and each draft's place among the targets; rows without a term are left out."""
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
    limit = _kept_rows(p)
    first = len(targets) + len(drafts) if _one_group(p, needs) else _slot_rows(p, needs) + limit
    group = _fill(sizes.tolist(), first, limit)
    place = used.cumsum(0) - 1
    of_draft = group[place[teacher]]
    out = []
    for g in range(int(group[-1]) + 1):
        mine, theirs = (group == g).nonzero().flatten(), (of_draft == g).nonzero().flatten()
        out.append((targets[mine], drafts[theirs], place[teacher[theirs]] - mine[0]))
    return out


def _fill(sizes: list[int], first: int, limit: int) -> Tensor:
    """Number of the group of every target: as many as fit under the limit (``first``: of group 0), at least one."""
    numbers, number, held = [], 0, 0
    for size in sizes:
        if held and held + size > (limit if number else first):
            number, held = number + 1, 0
        held += size
        numbers.append(number)
    return torch.tensor(numbers)


@dataclass(frozen=True, slots=True)
class _Group:
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
    def gather(cls, p: Problem, needs: Needs, targets: Tensor, drafts: Tensor, teachers: Tensor) -> "_Group":
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
class _Workspace:
    kept: Tensor
    """[rows, v] float32: logits between the passes, of rows that do not fit in the head's gradient."""
    fresh: Tensor
    """[rows, block] float32: logits of the block of rows that are kept nowhere; in the second pass the gradient of all rows."""
    head: Tensor
    """[block, d] float32: converted rows of the weight."""
    head_gradient: Tensor
    """[block, d] float32, before it is rounded."""
    bias: Tensor | None
    slot_rows: int
    block: int

    @classmethod
    def allocate(cls, p: Problem, needs: Needs, sizes: list[int]) -> "_Workspace":
        """``sizes``: rows of the groups."""
        v, d = p.weight.shape
        low, rounded = p.weight.dtype is not torch.float32, _one_group(p, needs)
        block = min(ROUNDED_BLOCK if rounded else BLOCK, v)
        head = block * d if low else 0
        rows, slots = max(sizes, default=0), _slot_rows(p, needs)
        kept = max([0, *(size - (0 if number else slots) for number, size in enumerate(sizes))])
        if rounded:
            held = 4 * (2 * head + rows * (2 * d + block))
            room = WORK_BYTES * (len(p.labels) + len(p.pair_index)) * v - held
            kept = min(kept, max(FEW_ROWS, int(room) // (4 * v)))
        return cls(
            new_output(kept, v), new_output(rows, block), new_output(block if low else 0, d),
            new_output(block if rounded else 0, d), None if p.bias is None else p.bias.float(), slots, block,
        )  # fmt: skip

    def head_rows(self, p: Problem, block: slice) -> Tensor:
        """[count, d] float32 rows of the weight."""
        rows = p.weight[block]
        return rows if rows.dtype is torch.float32 else self.head[: len(rows)].copy_(rows)


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the logits of a group lie: of its first rows in the head's gradient, of the next kept, of the last fresh."""

    space: _Workspace
    head: Tensor | None
    """[v, d] the head's gradient, where logits may wait in it."""
    rows: int
    slot_rows: int
    kept_rows: int
    """Slots included."""

    @classmethod
    def choose(cls, space: _Workspace, group: _Group, grad_weight: Tensor | None) -> "_Places":
        rows = len(group.hidden)
        slots = 0 if grad_weight is None else min(rows, space.slot_rows)
        return cls(space, grad_weight, rows, slots, min(rows, slots + len(space.kept)))

    def slots(self, block: slice) -> Tensor | None:
        """[slot rows, count] float32 in the block's part of the head's gradient."""
        if self.head is None or not self.slot_rows:
            return None
        memory = self.head[block].flatten()
        size = self.slot_rows * (block.stop - block.start) * 4 // memory.element_size()
        return memory[:size].view(torch.float32).view(self.slot_rows, -1)

    def kept(self, block: slice) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the group, and where their logits [rows, count] of the block stay."""
        slots = self.slots(block)
        if slots is not None:
            yield slice(0, self.slot_rows), slots
        if self.slot_rows < self.kept_rows:
            yield slice(self.slot_rows, self.kept_rows), self.space.kept[: self.kept_rows - self.slot_rows, block]

    def fresh(self, block: slice) -> Iterator[tuple[slice, Tensor]]:
        """The same of the rows whose logits are computed twice."""
        if self.kept_rows < self.rows:
            rows = slice(self.kept_rows, self.rows)
            yield rows, self.space.fresh[rows, : block.stop - block.start]

    def gradient(self, block: slice) -> Tensor:
        """[rows, count] of all rows."""
        return self.space.fresh[: self.rows, : block.stop - block.start]


def _blocks(p: Problem, size: int) -> Iterator[slice]:
    v = len(p.weight)
    return (slice(start, min(start + size, v)) for start in range(0, v, size))


def _arguments(p: Problem, group: _Group, places: _Places, block: slice, *options: int) -> list[int | float]:
    """In the order of read_loss in csrc/module.cpp."""
    space = places.space
    tensors = (
        places.slots(block), space.kept, space.fresh, space.bias, group.labels, group.teachers, group.scale, group.state,
    )  # fmt: skip
    sizes = (places.rows, len(group.targets), places.slot_rows, places.kept_rows, len(p.weight), space.block)
    return [
        *map(address, tensors), *sizes, p.softcap or 0.0, p.temperature, *options, block.start, block.stop - block.start,
    ]  # fmt: skip


def _product(hidden: Tensor, head: Tensor, out: Tensor) -> None:
    """out [rows, count] = hidden @ head.T."""
    torch.mm(hidden[:, :DEPTH], head[:, :DEPTH].T, out=out)
    for start in range(DEPTH, hidden.shape[1], DEPTH):
        part = slice(start, start + DEPTH)
        out.addmm_(hidden[:, part], head[:, part].T)


def _first_pass(p: Problem, group: _Group, space: _Workspace, places: _Places, library: Native) -> None:
    for block in _blocks(p, space.block):
        head = space.head_rows(p, block)
        for rows, logits in (*places.kept(block), *places.fresh(block)):
            _product(group.hidden[rows], head, logits)
        arguments = _arguments(p, group, places, block, False, True, library.threads)
        library.module.loss_statistics(library.table, *arguments)


def _second_pass(
    p: Problem, needs: Needs, group: _Group, space: _Workspace, places: _Places, results: "_Results", library: Native, *,
    accumulate: bool,
) -> None:  # fmt: skip
    hidden_wanted = len(group.gradient) > 0
    for block in _blocks(p, space.block):
        head = space.head_rows(p, block) if hidden_wanted or places.kept_rows < places.rows else None
        for rows, logits in places.fresh(block):
            assert head is not None
            _product(group.hidden[rows], head, logits)
        arguments = _arguments(p, group, places, block, needs.gradients, needs.stats, library.threads)
        library.module.loss_gradient(library.table, *arguments)
        gradient = places.gradient(block)
        if hidden_wanted:
            assert head is not None
            wanted = slice(0 if needs.target else len(group.targets), None if needs.draft else len(group.targets))
            group.gradient[wanted].addmm_(gradient[wanted], head)
        if results.grad_weight is not None:
            _add_to_head(group, gradient, space, results.grad_weight[block], accumulate=accumulate)
        if results.grad_bias is not None:
            results.grad_bias[block] += gradient.sum(0)


def _add_to_head(group: _Group, gradient: Tensor, space: _Workspace, out: Tensor, *, accumulate: bool) -> None:
    """out (+)= G^T h: complete over the batch where it has to be rounded."""
    if out.dtype is not torch.float32:
        out.copy_(torch.mm(gradient.T, group.hidden, out=space.head_gradient[: len(out)]))
    elif accumulate:
        out.addmm_(gradient.T, group.hidden)
    else:
        torch.mm(gradient.T, group.hidden, out=out)


@dataclass(frozen=True, slots=True)
class _Results:
    cross_entropy: Tensor
    divergence: Tensor
    grad_target: Tensor | None
    grad_draft: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    stats: LossStats | None

    @classmethod
    def allocate(cls, p: Problem, needs: Needs, covered: int) -> "_Results":
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

    def finish(self, p: Problem, group: _Group) -> None:
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
