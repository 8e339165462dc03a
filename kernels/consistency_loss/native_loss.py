"""The consistency loss on a CPU: products (native_products.py), everything between them in C++, the vocabulary in blocks.

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

from engine.kernels.consistency_loss.native_products import Products, held_bytes, products
from engine.kernels.consistency_loss.native_rows import Group, Results, blocks, groups
from engine.kernels.consistency_loss.problem import Needs, Outcome, Problem
from engine.kernels.native import Native, address, native, new_output

BLOCK = 1024  # vocabulary rows of one product: larger ones were no faster, and take room from logits
KEPT_BYTES = 1.4  # for each row and entry of the vocabulary: logits of a group of rows outside the head's gradient
WORK_BYTES = 1.6  # everything, where all rows make one group; eager PyTorch holds 12 to 13 beyond the gradients
FEW_ROWS = 96  # are not divided further


def reason_against(p: Problem) -> str | None:
    """Why the C++ implementation cannot take the problem, or None."""
    if not p.weight.is_cpu:
        return f"it needs CPU tensors, got {p.weight.device}"
    if p.weight.dtype is torch.float64:
        return "it needs float32, bfloat16 or float16, got torch.float64"
    if p.plan == "recompute":
        return 'it offers plan="dense" and plan="sparse", got plan="recompute"'
    return None if native() else "the C++ extension is not built"


def loss_and_gradients(p: Problem, needs: Needs) -> Outcome:
    """As the reference. A row's bits depend on nothing but the rows of its group; nothing depends on timing."""
    library = native()
    assert library is not None
    every = len(p.labels) + len(p.pair_index)
    first = every if _one_group(p, needs) else _slot_rows(p, needs) + kept_rows(p)
    parts = groups(p, needs, first, kept_rows(p))
    sizes = [len(targets) + len(drafts) for targets, drafts, _ in parts]
    results = Results.allocate(p, needs, covered=sum(sizes))
    space = _Workspace.allocate(p, needs, sizes, library)
    for number, (targets, drafts, teachers) in enumerate(parts):
        group = Group.gather(p, needs, targets, drafts, teachers)
        places = _Places.choose(space, group, results.grad_weight if number == 0 else None)
        work = products(group.hidden, p.weight.dtype, space.block, library)
        _first_pass(p, group, places, work, library)
        if needs.gradients or needs.stats or len(drafts):
            _second_pass(p, needs, group, places, work, results, library, accumulate=number > 0)
        results.finish(p, group)
    return results.outcome(p)


def _one_group(p: Problem, needs: Needs) -> bool:
    return needs.weight and p.weight.dtype is not torch.float32


def _slot_rows(p: Problem, needs: Needs) -> int:
    """Rows whose float32 logits fit in the memory of the head's gradient."""
    return p.weight.shape[1] * p.weight.element_size() // 4 if needs.weight else 0


def kept_rows(p: Problem) -> int:
    """Rows of a group whose logits lie outside the head's gradient."""
    rows = len(p.labels) + len(p.pair_index)
    return max(FEW_ROWS, int(KEPT_BYTES * rows / 4))


@dataclass(frozen=True, slots=True)
class _Workspace:
    kept: Tensor
    """[rows, v] float32: logits between the passes, of rows that do not fit in the head's gradient."""
    fresh: Tensor
    """[rows, block] float32: logits of the block of rows that are kept nowhere; in the second pass the gradient of all rows."""
    bias: Tensor | None
    slot_rows: int
    block: int

    @classmethod
    def allocate(cls, p: Problem, needs: Needs, sizes: list[int], library: Native) -> "_Workspace":
        """``sizes``: rows of the groups."""
        v, d = p.weight.shape
        rounded = _one_group(p, needs)
        block = min(BLOCK, v)
        rows, slots = max(sizes, default=0), _slot_rows(p, needs)
        kept = max([0, *(size - (0 if number else slots) for number, size in enumerate(sizes))])
        if rounded:
            held = 4 * rows * (2 * d + block) + held_bytes(p.weight.dtype, rows, block, d, library)
            room = WORK_BYTES * (len(p.labels) + len(p.pair_index)) * v - held
            kept = min(kept, max(FEW_ROWS, int(room) // (4 * v)))
        return cls(
            new_output(kept, v), new_output(rows, block), None if p.bias is None else p.bias.float(), slots, block
        )


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
    def choose(cls, space: _Workspace, group: Group, grad_weight: Tensor | None) -> "_Places":
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


def _arguments(p: Problem, group: Group, places: _Places, block: slice, *options: int) -> list[int | float]:
    """In the order of read_loss in csrc/module.cpp."""
    space = places.space
    tensors = (
        places.slots(block), space.kept, space.fresh, space.bias, group.labels, group.teachers, group.scale, group.state,
    )  # fmt: skip
    sizes = (places.rows, len(group.targets), places.slot_rows, places.kept_rows, len(p.weight), space.block)
    return [
        *map(address, tensors), *sizes, p.softcap or 0.0, p.temperature, *options, block.start, block.stop - block.start,
    ]  # fmt: skip


def _first_pass(p: Problem, group: Group, places: _Places, work: Products, library: Native) -> None:
    for block in blocks(p, places.space.block):
        work.take(p.weight[block])
        for rows, logits in (*places.kept(block), *places.fresh(block)):
            work.logits(rows, logits)
        arguments = _arguments(p, group, places, block, False, True, library.threads)
        library.module.loss_statistics(library.table, *arguments)


def _second_pass(
    p: Problem, needs: Needs, group: Group, places: _Places, work: Products, results: Results, library: Native, *,
    accumulate: bool,
) -> None:  # fmt: skip
    for block in blocks(p, places.space.block):
        work.take(p.weight[block])
        for rows, logits in places.fresh(block):
            work.logits(rows, logits)
        arguments = _arguments(p, group, places, block, needs.gradients, needs.stats, library.threads)
        library.module.loss_gradient(library.table, *arguments)
        gradient = places.gradient(block)
        if len(group.gradient):
            wanted = slice(0 if needs.target else len(group.targets), None if needs.draft else len(group.targets))
            work.add_to_hidden(gradient[wanted], group.gradient[wanted])
        if results.grad_weight is not None:
            work.head_gradient(gradient, results.grad_weight[block], accumulate=accumulate)
        if results.grad_bias is not None:
            results.grad_bias[block] += gradient.sum(0)
