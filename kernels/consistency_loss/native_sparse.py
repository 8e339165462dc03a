"""The sparse plan of the consistency loss on a CPU: exact logits, then products over the entries of dL/dlogits that matter.

A trained model's distribution has its mass in few words. Of G = dL/dlogits a row keeps the largest entries, such that the
magnitudes of what it leaves out sum to at most ``filter_eps`` of the row's; the label's entry is always kept. dh = G W and
dW = G^T h then walk lists of entries: with a density of d they take 4 d of the 4 units of work that the dense plan spends on
them, at about half its rate, which is why whole entries are skipped and not tiles (of which 5 to 40 times as many hold one).

What is left out is replaced by a product of rank one: the sum of what a row leaves out times the mean of the head's rows that
it was left out of, and for dW the sum of what a column leaves out times the mean hidden state. So the columns of G still add
up to what they should, and a direction that all of the head's rows share, which a bare filter turns into a bias, cancels.

A group of rows is finished up to its lists, logits of the next one then take their place in the memory of the head's gradient;
last, one pass over the vocabulary does all products. Where the lists would be long the dense plan does everything.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.kernels.consistency_loss import native_loss
from engine.kernels.consistency_loss.native_rows import Group, Results, blocks, groups, product
from engine.kernels.consistency_loss.problem import Needs, Outcome, Problem
from engine.kernels.native import Native, address, native, new_output

LOGIT_BLOCK = 2048  # vocabulary rows of one product
ENTRY_BLOCK = 1024  # the same where lists of entries are walked: a strip of 256 columns lies in the L2 cache
MAX_DENSITY = 1 / 8  # longest lists: 1 byte per row and word of the vocabulary; eager PyTorch holds 12 to 13
TRIAL_ROWS = 32  # of a large problem: is it worth trying?
LARGE_ROWS = 256


def loss_and_gradients(p: Problem, needs: Needs) -> Outcome:
    """As the reference but for what ``p.filter_eps`` allows to leave out; nothing depends on timing."""
    outcome = _sparse(p, needs) if p.filter_eps > 0 and needs.gradients else None
    return native_loss.loss_and_gradients(replace(p, plan="dense"), needs) if outcome is None else outcome


def _sparse(p: Problem, needs: Needs) -> Outcome | None:
    """None where too little can be left out."""
    library = native()
    assert library is not None
    rows, limit = len(p.labels) + len(p.pair_index), _group_rows(p, needs)
    parts = groups(p, needs, TRIAL_ROWS if rows >= LARGE_ROWS else limit, limit)
    sizes = [len(targets) + len(drafts) for targets, drafts, _ in parts]
    results = Results.allocate(p, needs, covered=sum(sizes))
    logits = _logits_memory(p, results.grad_weight, max(sizes, default=0))
    found = []
    for targets, drafts, teachers in parts:
        group = Group.gather(p, needs, targets, drafts, teachers)
        entries = _entries(p, needs, group, logits[: len(group.hidden)], library)
        if entries is None:
            return None
        found.append((group, entries))
    _products(p, needs, found, results, library)
    for group, _ in found:
        results.finish(p, group)
    return results.outcome(p)


def _group_rows(p: Problem, needs: Needs) -> int:
    slots = p.weight.shape[1] * p.weight.element_size() // 4 if needs.weight else 0
    return max(slots, native_loss.kept_rows(p))


def _logits_memory(p: Problem, grad_weight: Tensor | None, rows: int) -> Tensor:
    """[rows, v] float32, in the memory of the head's gradient if they fit there: it is written last."""
    v = len(p.weight)
    if grad_weight is not None and rows * v * 4 <= grad_weight.numel() * grad_weight.element_size():
        return grad_weight.flatten()[: rows * v * 4 // grad_weight.element_size()].view(torch.float32).view(rows, v)
    return new_output(rows, v)


@dataclass(frozen=True, slots=True)
class _Entries:
    """Of a group's gradient; FilterArgs in csrc/kernels.h."""

    columns: Tensor
    values: Tensor
    begin: Tensor
    count: Tensor
    left_out_of_row: Tensor
    left_out: Tensor
    left_out_share: Tensor

    @classmethod
    def allocate(cls, rows: int, v: int) -> "_Entries":
        # memory that nothing is written to costs nothing
        capacity = int(MAX_DENSITY * rows * v) + rows
        return cls(
            new_output(capacity, dtype=torch.int32), new_output(capacity), new_output(rows, dtype=torch.int64),
            new_output(rows, dtype=torch.int64), new_output(rows, 2), new_output(v), new_output(v),
        )  # fmt: skip

    def lists(self) -> list[int]:
        return [address(t) for t in (self.columns, self.values, self.begin, self.count)]


def _entries(p: Problem, needs: Needs, group: Group, logits: Tensor, library: Native) -> _Entries | None:
    """Of a group whose logits are computed here; None where there are too many."""
    bias = None if p.bias is None else p.bias.float()
    for block in blocks(p, LOGIT_BLOCK):
        product(group.hidden, p.weight[block].float(), logits[:, block])
        arguments = _arguments(p, group, logits, bias, False, True, library.threads, block)
        library.module.loss_statistics(library.table, *arguments)
    entries = _Entries.allocate(*logits.shape)
    order = torch.cat((torch.arange(len(group.targets)), group.teachers)).argsort(stable=True)
    used = torch.zeros(1, dtype=torch.int64)
    library.module.loss_filter(
        library.table,
        *_arguments(p, group, logits, bias, True, needs.stats, library.threads, slice(0, len(p.weight))),
        address(order), p.filter_eps, address(entries.columns), address(entries.values), len(entries.values), address(used),
        *map(address, (entries.begin, entries.count, entries.left_out_of_row, entries.left_out, entries.left_out_share)),
    )  # fmt: skip
    return entries if used.item() <= len(entries.values) else None


def _arguments(
    p: Problem, group: Group, logits: Tensor, bias: Tensor | None, gradients: bool, stats: bool, threads: int, block: slice
) -> list[int | float]:  # fmt: skip
    """In the order of read_loss in csrc/module.cpp: no slots, every row kept, nothing fresh."""
    rows, v = logits.shape
    tensors = (None, logits, None, bias, group.labels, group.teachers, group.scale, group.state)
    sizes = (rows, len(group.targets), 0, rows, v, v)
    options = (p.softcap or 0.0, p.temperature, gradients, stats, threads)
    return [*map(address, tensors), *sizes, *options, block.start, block.stop - block.start]


def _products(
    p: Problem, needs: Needs, found: list[tuple[Group, _Entries]], results: Results, library: Native
) -> None:  # fmt: skip
    """dh = G W and dW = G^T h of all groups, block by block of the vocabulary."""
    means = [torch.zeros(p.weight.shape[1]) for _ in found]
    for block in blocks(p, ENTRY_BLOCK):
        head = p.weight[block].float()
        for (group, entries), mean in zip(found, means, strict=True):
            if len(group.gradient):
                first, last = _wanted(needs, group)
                library.module.loss_sparse_hidden(
                    library.table, *entries.lists(), address(head), address(group.gradient), 0, 0, 0, first, last,
                    p.weight.shape[1], block.start, len(head), True, library.threads,
                )  # fmt: skip
                mean.addmv_(head.T, entries.left_out_share[block])
        if needs.weight or needs.bias:
            _head_products(p, found, results, block, library)
    for (group, entries), mean in zip(found, means, strict=True):
        if len(group.gradient):
            rows = slice(*_wanted(needs, group))
            share = entries.left_out_share.sum()
            weights = entries.left_out_of_row[rows, 0] / share.where(share > 0, 1)
            group.gradient[rows].addr_(weights, mean)


def _wanted(needs: Needs, group: Group) -> tuple[int, int]:
    targets = len(group.targets)
    return 0 if needs.target else targets, len(group.hidden) if needs.draft else targets


def _head_products(
    p: Problem, found: list[tuple[Group, _Entries]], results: Results, block: slice, library: Native
) -> None:  # fmt: skip
    """A block of dW and of the bias's gradient, added up over the groups in float32."""
    out = None if results.grad_weight is None else results.grad_weight[block]
    exact = out if out is None or out.dtype is torch.float32 else new_output(*out.shape)
    for number, (group, entries) in enumerate(found):
        mass = entries.left_out_of_row[:, 1]
        total = mass.sum()
        mean = mass / total.where(total > 0, 1) @ group.hidden
        library.module.loss_sparse_head(
            library.table, *entries.lists(), address(group.hidden), address(exact), address(entries.left_out),
            address(mean), address(results.grad_bias), 0, *group.hidden.shape, block.start, block.stop - block.start,
            number > 0, library.threads,
        )  # fmt: skip
    if out is not None and exact is not None and exact is not out:
        out.copy_(exact)
