"""The consistency loss in C++ for the CPU: rows in groups, the vocabulary in blocks, no [rows, vocabulary] matrix.

With float32, or where the head needs no gradient, groups of rows keep their logits between the two passes over the
vocabulary and add to the gradient of the head: 6 units of work (of 2 * rows per stream * V * D operations). With bfloat16
that would need a float32 copy of the gradient; there all rows pass over the vocabulary together, each block of the gradient is
finished and rounded once, and the logits that memory has no room for are computed twice: up to 8 units.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.consistency_loss.problem import LossStats, Needs, Outcome, Problem
from engine.kernels.native import Native, address, native, new_output

TYPES = {torch.float32: 0, torch.bfloat16: 1}
PANEL = 48  # rows whose logits lie side by side; kStrip in csrc/loss_gemm.h
KEPT_BYTES = (
    1.15  # of logits for each row and entry of the vocabulary: a tenth of what eager PyTorch holds beyond gradients
)
FEW_ROWS = 2 * PANEL  # are not divided further


def reason_against(p: Problem) -> str | None:
    """Why the C++ implementation cannot take the problem, or None."""
    if not p.weight.is_cpu:
        return f"it needs CPU tensors, got {p.weight.device}"
    if p.weight.dtype not in TYPES:
        return f"it needs float32 or bfloat16, got {p.weight.dtype}"
    if p.plan not in ("auto", "dense"):
        return f'it offers plan="dense", got {p.plan!r}'
    return None if native() else "the C++ extension is not built"


def loss_and_gradients(p: Problem, needs: Needs) -> Outcome:
    """As the reference. A row's bits depend on nothing but the rows of its group; nothing depends on timing."""
    library = native()
    assert library is not None
    groups = _groups(p, needs)
    results = _Results.allocate(p, needs, covered=sum(map(len, (g for t, d, _ in groups for g in (t, d)))))
    panels = _kept_rows(p) // PANEL if _one_group(p, needs) else 1 << 40
    calls = []
    for number, (targets, drafts, teachers) in enumerate(groups):
        chosen = (targets, drafts, teachers, p.labels[targets], p.ce_scale[targets], p.kl_scale[drafts])
        calls.append(results.arguments(p, chosen, panels, accumulate=number > 0, threads=library.threads))
    workspace = torch.empty(max((_run(library, call, None) for call in calls), default=0), dtype=torch.uint8)
    for call in calls:
        _run(library, call, workspace)
    return results.outcome(p)


def _one_group(p: Problem, needs: Needs) -> bool:
    return needs.weight and p.weight.dtype is not torch.float32


def _kept_rows(p: Problem) -> int:
    rows = len(p.labels) + len(p.pair_index)
    return max(FEW_ROWS, int(KEPT_BYTES * rows / 4) // PANEL * PANEL)


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
    limit = len(targets) + len(drafts) if _one_group(p, needs) else _kept_rows(p)
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

    def arguments(
        self, p: Problem, rows: tuple[Tensor, ...], panels: int, *, accumulate: bool, threads: int
    ) -> list[Tensor | float | int | None]:
        """In the order of LossArgs in csrc/kernels.h."""
        stats = self.stats
        bias = None if p.bias is None else p.bias.float()
        by_row = (None, None, None) if stats is None else (stats.lse, stats.entropy, stats.argmax_agrees)
        return [
            p.target_hidden, p.draft_hidden, p.weight, bias, *rows, self.cross_entropy, self.divergence,
            self.grad_target, self.grad_draft, self.grad_weight, self.grad_bias, *by_row,
            len(p.labels), p.weight.shape[1], p.weight.shape[0], len(rows[0]), len(rows[1]), panels,
            p.softcap or 0.0, p.temperature, TYPES[p.weight.dtype], accumulate, threads,
        ]  # fmt: skip

    def outcome(self, p: Problem) -> Outcome:
        divergence = self.divergence.where(p.pair_index >= 0, 0)
        if self.stats is not None:
            self.stats.argmax_agrees.logical_and_(p.pair_index >= 0)
        bias = None if self.grad_bias is None else self.grad_bias.to(p.weight.dtype)
        return Outcome(
            self.cross_entropy, divergence, self.grad_target, self.grad_draft, self.grad_weight, bias, self.stats
        )


def _run(library: Native, arguments: list[Tensor | float | int | None], workspace: Tensor | None) -> int:
    """Calls the kernel; without a workspace it only says how many bytes it must have."""
    values = [address(a) if a is None or isinstance(a, Tensor) else a for a in arguments]
    size: int = library.module.consistency_loss(library.table, *values, address(workspace))
    return size
