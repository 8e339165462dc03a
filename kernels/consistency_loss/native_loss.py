"""The consistency loss on a CPU: products by PyTorch's BLAS, everything between them in C++, the vocabulary in blocks.

Two passes over the vocabulary: logits and their rows' statistics, then gradients. With float32, or where the head needs no
gradient, groups of rows keep their logits between the passes and add to the gradient of the head: 6 units of work (of
2 * rows per stream * V * D operations). With 16 bits that would need a float32 copy of the gradient; there all rows pass over
the vocabulary together, each block of the gradient is finished and rounded once, and the logits that memory has no room for
are computed twice: up to 8 units.
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
KEPT_BYTES = 1.4  # for each row and entry of the vocabulary: logits of a group of rows
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
    results = _Results.allocate(p, needs, covered=sum(len(targets) + len(drafts) for targets, drafts, _ in groups))
    space = _Workspace.allocate(p, needs, max((len(targets) + len(drafts) for targets, drafts, _ in groups), default=0))
    for number, (targets, drafts, teachers) in enumerate(groups):
        group = _Group.gather(p, needs, targets, drafts, teachers)
        _first_pass(p, group, space, library)
        if needs.gradients or needs.stats or len(drafts):
            _second_pass(p, needs, group, space, results, library, accumulate=number > 0)
        results.finish(p, group)
    return results.outcome(p)


def _one_group(p: Problem, needs: Needs) -> bool:
    return needs.weight and p.weight.dtype is not torch.float32


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
    rows = len(targets) + len(drafts)
    limit = rows if _one_group(p, needs) else min(rows, _kept_rows(p))
    even = -(-rows // -(-rows // limit)) + int(sizes.max()) - 1  # as few groups as the limit allows, of about one size
    limit = min(limit, even)
    group = _fill(sizes.tolist(), limit)
    place = used.cumsum(0) - 1
    of_draft = group[place[teacher]]
    out = []
    for g in range(int(group[-1]) + 1):
        mine, theirs = (group == g).nonzero().flatten(), (of_draft == g).nonzero().flatten()
        out.append((targets[mine], drafts[theirs], place[teacher[theirs]] - mine[0]))
    return out


def _fill(sizes: list[int], limit: int) -> Tensor:
    """Number of the group of every target: as many as fit under the limit, at least one."""
    numbers, number, held = [], 0, 0
    for size in sizes:
        if held and held + size > limit:
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
    """[rows, v] float32: logits that stay between the passes."""
    fresh: Tensor
    """[rows, block] float32: a block of the others'."""
    head: Tensor
    """[block, d] float32: converted rows of the weight."""
    head_gradient: Tensor
    """[block, d] float32, before it is rounded."""
    bias: Tensor | None
    block: int

    @classmethod
    def allocate(cls, p: Problem, needs: Needs, rows: int) -> "_Workspace":
        v, d = p.weight.shape
        low, rounded = p.weight.dtype is not torch.float32, _one_group(p, needs)
        block = min(ROUNDED_BLOCK if rounded else BLOCK, v)
        head = block * d if low else 0
        kept = rows
        if rounded:
            held = 4 * (2 * head + rows * (2 * d + block))
            room = WORK_BYTES * (len(p.labels) + len(p.pair_index)) * v - held
            kept = min(rows, max(FEW_ROWS, int(room) // (4 * v)))
        return cls(
            new_output(kept, v), new_output(rows - kept, block), new_output(block if low else 0, d),
            new_output(block if rounded else 0, d), None if p.bias is None else p.bias.float(), block,
        )  # fmt: skip

    def head_rows(self, p: Problem, block: slice) -> Tensor:
        """[count, d] float32 rows of the weight."""
        rows = p.weight[block]
        return rows if rows.dtype is torch.float32 else self.head[: len(rows)].copy_(rows)

    def logits(self, group: _Group, block: slice) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the group and where their logits [rows, count] of the block lie."""
        rows, kept = len(group.hidden), min(len(self.kept), len(group.hidden))
        yield slice(0, kept), self.kept[:kept, block]
        if kept < rows:
            yield slice(kept, rows), self.fresh[: rows - kept, : block.stop - block.start]


def _blocks(p: Problem, size: int) -> Iterator[slice]:
    v = len(p.weight)
    return (slice(start, min(start + size, v)) for start in range(0, v, size))


def _arguments(p: Problem, group: _Group, space: _Workspace, *options: int) -> list[int | float]:
    """In the order of read_loss in csrc/module.cpp, without the block."""
    tensors = (space.kept, space.fresh, space.bias, group.labels, group.teachers, group.scale, group.state)
    kept = min(len(space.kept), len(group.hidden))
    sizes = (len(group.hidden), len(group.targets), kept, len(p.weight), space.block)
    return [*map(address, tensors), *sizes, p.softcap or 0.0, p.temperature, *options]


def _product(hidden: Tensor, head: Tensor, out: Tensor) -> None:
    """out [rows, count] = hidden @ head.T."""
    torch.mm(hidden[:, :DEPTH], head[:, :DEPTH].T, out=out)
    for start in range(DEPTH, hidden.shape[1], DEPTH):
        part = slice(start, start + DEPTH)
        out.addmm_(hidden[:, part], head[:, part].T)


def _first_pass(p: Problem, group: _Group, space: _Workspace, library: Native) -> None:
    arguments = _arguments(p, group, space, False, True, library.threads)
    for block in _blocks(p, space.block):
        head = space.head_rows(p, block)
        for rows, logits in space.logits(group, block):
            _product(group.hidden[rows], head, logits)
        library.module.loss_statistics(library.table, *arguments, block.start, len(head))


def _second_pass(
    p: Problem, needs: Needs, group: _Group, space: _Workspace, results: "_Results", library: Native, *, accumulate: bool
) -> None:  # fmt: skip
    arguments = _arguments(p, group, space, needs.gradients, needs.stats, library.threads)
    for block in _blocks(p, space.block):
        parts = list(space.logits(group, block))
        head = space.head_rows(p, block) if len(parts) > 1 or len(group.gradient) else None
        for rows, logits in parts[1:]:
            assert head is not None
            _product(group.hidden[rows], head, logits)
        library.module.loss_gradient(library.table, *arguments, block.start, block.stop - block.start)
        if len(group.gradient):
            assert head is not None
            _add_to_hidden(needs, group, parts, head)
        if results.grad_weight is not None:
            _add_to_head(group, parts, space, results.grad_weight[block], accumulate=accumulate)
        if results.grad_bias is not None:
            for _, logits in parts:
                results.grad_bias[block] += logits.sum(0)


def _add_to_hidden(needs: Needs, group: _Group, parts: list[tuple[slice, Tensor]], head: Tensor) -> None:
    """gradient += G W for the streams that want one."""
    first = 0 if needs.target else len(group.targets)
    last = len(group.hidden) if needs.draft else len(group.targets)
    for rows, g in parts:
        low, high = max(rows.start, first), min(rows.stop, last)
        if low < high:
            group.gradient[low:high].addmm_(g[low - rows.start : high - rows.start], head)


def _add_to_head(
    group: _Group, parts: list[tuple[slice, Tensor]], space: _Workspace, out: Tensor, *, accumulate: bool
) -> None:
    """out (+)= G^T h: complete over the batch where it has to be rounded."""
    exact = out if out.dtype is torch.float32 else space.head_gradient[: len(out)]
    for number, (rows, g) in enumerate(parts):
        if accumulate or number:
            exact.addmm_(g.T, group.hidden[rows])
        else:
            torch.mm(g.T, group.hidden[rows], out=exact)
    if exact is not out:
        out.copy_(exact)


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
