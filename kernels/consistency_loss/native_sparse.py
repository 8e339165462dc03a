"""The sparse plan of the consistency loss on a CPU: exact logits, then products over the entries of dL/dlogits that matter.

A trained model's distribution has its mass in few words. Of G = dL/dlogits a row keeps its largest entries, such that the
magnitudes of what it leaves out sum to at most ``filter_eps`` of the row's; the label's entry is always kept. dh = G W and
dW = G^T h then walk lists of single entries: with a density of d, 4 d units of work instead of the dense plan's 4. Gathered
columns or rows would go through a BLAS, but hold 5 to 10 times as many entries.

What is left out is not lost. For dh, entries left out add up along the vocabulary, and as often as a sum reaches the smallest
magnitude kept, the entry there stands for all of them: any stretch of the vocabulary keeps its mass, and what a row's entries
have in common does not become a bias. What this adds is noise, bounded relative to the row by NOISE * filter_eps. For dW,
where a word would get the noise of few rows, the sum of what its column leaves out times a mean hidden state takes their
place; the bias's gradient is exact.

A group of rows is finished up to its lists, logits of the next one then take their place in the memory of the head's gradient;
last, one pass over the vocabulary does all products. Where the lists would be long the dense plan does everything.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.consistency_loss import native_loss
from engine.kernels.consistency_loss.native_products import products
from engine.kernels.consistency_loss.native_rows import Group, Results, blocks, groups
from engine.kernels.consistency_loss.problem import Needs, Outcome, Problem
from engine.kernels.native import Native, address, native, new_output

LOGIT_BLOCK = 2048  # vocabulary rows of one product
ENTRY_BLOCK = 1024  # the same where lists of entries are walked
STRIP = 256  # columns of hidden states, or of a block of the head, that stay in the cache
NOISE = 1 / 20  # of filter_eps: deviation of a row from what stands for it, relative to its Euclidean norm
MAX_DENSITY = 1 / 8  # longest lists: 1 byte per row and word of the vocabulary; eager PyTorch holds 12 to 13
TRIAL_ROWS = 32  # of a large problem, spread over it: is it worth trying?
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
    large = rows >= LARGE_ROWS
    parts = groups(p, needs, TRIAL_ROWS if large else limit, limit, spread=large)
    sizes = [len(targets) + len(drafts) for targets, drafts, _ in parts]
    results = Results.allocate(p, needs, covered=sum(sizes))
    logits = _logits_memory(p, results.grad_weight, max(sizes, default=0))
    found: list[_Part] = []
    for targets, drafts, teachers in parts:
        group = Group.gather(p, needs, targets, drafts, teachers)
        entries = _entries(p, needs, group, logits, library)
        if entries is None:
            return None
        found.append(_Part.prepare(group, entries))
    _products(p, needs, found, results, library)
    for part in found:
        results.finish(p, part.group)
    return results.outcome(p)


def _group_rows(p: Problem, needs: Needs) -> int:
    slots = p.weight.shape[1] * p.weight.element_size() // 4 if needs.weight else 0
    return max(slots, native_loss.kept_rows(p))


def _logits_memory(p: Problem, grad_weight: Tensor | None, rows: int) -> Tensor:
    """[rows * v] float32, in the memory of the head's gradient if they fit there: it is written last."""
    size = rows * len(p.weight)
    if grad_weight is not None and size * 4 <= grad_weight.numel() * grad_weight.element_size():
        return grad_weight.flatten()[: size * 4 // grad_weight.element_size()].view(torch.float32)
    return new_output(size)


@dataclass(frozen=True, slots=True)
class _Entries:
    """Of a group's gradient; FilterArgs in csrc/kernels.h."""

    columns: Tensor
    """[capacity] int32."""
    values: Tensor
    begin: Tensor
    """[rows] int64."""
    count: Tensor
    """[rows] int64: entries that are kept."""
    stand_ins: Tensor
    """[rows] int64: entries behind them, which stand for the others in dh."""
    left_out_of_row: Tensor
    """[rows, 2] float32: the sum of what is left out and not stood for; magnitudes of all that is left out."""
    left_out: Tensor
    """[v] float32: sum over rows."""
    left_out_share: Tensor
    """[v] float32: of magnitudes, each relative to its row's mass."""

    @classmethod
    def allocate(cls, rows: int, v: int) -> "_Entries":
        # memory that nothing is written to costs nothing
        capacity = int(MAX_DENSITY * rows * v) + rows
        begin, count, stand_ins = (new_output(rows, dtype=torch.int64) for _ in range(3))
        return cls(
            new_output(capacity, dtype=torch.int32), new_output(capacity), begin, count, stand_ins, new_output(rows, 2),
            new_output(v), new_output(v),
        )  # fmt: skip

    def kept(self) -> tuple[Tensor, ...]:
        """In the order of read_sparse in csrc/module.cpp."""
        return self.columns, self.values, self.begin, self.count

    def standing(self) -> tuple[Tensor, ...]:
        """The same of the stand-ins."""
        return self.columns, self.values, self.begin + self.count, self.stand_ins


def _entries(p: Problem, needs: Needs, group: Group, logits: Tensor, library: Native) -> _Entries | None:
    """Of a group, whose logits are computed here; None where there are too many."""
    bias = None if p.bias is None else p.bias.float()
    rows, v = len(group.hidden), len(p.weight)
    work = products(group.hidden, p.weight.dtype, min(LOGIT_BLOCK, v), library)
    for block in blocks(p, LOGIT_BLOCK):
        here = logits[rows * block.start : rows * block.stop]
        work.take(p.weight[block])
        work.logits(slice(None), here.view(rows, -1))
        library.module.loss_statistics(
            library.table, *_loss_arguments(p, group, here, bias), False, True, library.threads, block.start, len(here) // rows
        )  # fmt: skip
    entries = _Entries.allocate(rows, v)
    # a draft next to its teacher, for the cache
    order = torch.cat((torch.arange(len(group.targets)), group.teachers)).argsort(stable=True)
    used = torch.zeros(1, dtype=torch.int64)
    eps = (p.filter_eps, NOISE * p.filter_eps)
    library.module.loss_filter(
        library.table, *_loss_arguments(p, group, logits, bias), True, needs.stats, library.threads, 0, min(LOGIT_BLOCK, v),
        address(order), *eps, *map(address, (entries.columns, entries.values)), len(entries.values),
        *map(address, (used, entries.begin, entries.count, entries.stand_ins)),
        *map(address, (entries.left_out_of_row, entries.left_out, entries.left_out_share)),
    )  # fmt: skip
    return entries if used.item() <= len(entries.values) else None


def _loss_arguments(p: Problem, group: Group, logits: Tensor, bias: Tensor | None) -> list[int | float]:
    """The first ones of read_loss in csrc/module.cpp: all logits in slots."""
    rows = len(group.hidden)
    tensors = (logits, None, None, bias, group.labels, group.teachers, group.scale, group.state)
    sizes = (rows, len(group.targets), rows, rows, len(p.weight), 0)
    return [*map(address, tensors), *sizes, p.softcap or 0.0, p.temperature]


@dataclass(frozen=True, slots=True)
class _Part:
    """A group with what its products need."""

    group: Group
    entries: _Entries
    strips: Tensor
    """[strips, rows, STRIP] hidden states: what a strip of the head's gradient reads lies together."""
    mean_hidden: Tensor
    """[d] of the rows, each by how much it leaves out."""
    mean_head: Tensor
    """[d] of the head's rows, each by how much of its column is left out; summed up block by block."""

    @classmethod
    def prepare(cls, group: Group, entries: _Entries) -> "_Part":
        rows, d = group.hidden.shape
        count = -(-d // STRIP)
        strips = F.pad(group.hidden, (0, count * STRIP - d)).view(rows, count, STRIP).transpose(0, 1).contiguous()
        mass = entries.left_out_of_row[:, 1]
        total = mass.sum()
        mean_hidden = mass / total.where(total > 0, 1) @ group.hidden
        return cls(group, entries, strips, mean_hidden, torch.zeros(d))


def _products(p: Problem, needs: Needs, parts: list[_Part], results: Results, library: Native) -> None:
    """dh = G W and dW = G^T h of all groups, block by block of the vocabulary."""
    for block in blocks(p, ENTRY_BLOCK):
        if needs.target or needs.draft:
            head = p.weight[block].float()
            for part in parts:
                _add_to_hidden(needs, part, head, block, library)
        if needs.weight or needs.bias:
            _write_head(parts, results, block, library)
    for part in parts:
        share = part.entries.left_out_share.sum()
        left_out = part.entries.left_out_of_row[: len(part.group.gradient), 0]
        part.group.gradient.addr_(left_out / share.where(share > 0, 1), part.mean_head)


def _add_to_hidden(needs: Needs, part: _Part, head: Tensor, block: slice, library: Native) -> None:
    """gradient [rows, d] += G[:, block] head, of the streams that want one."""
    targets, (rows, d) = len(part.group.targets), part.group.gradient.shape
    wanted = (0 if needs.target else targets, rows if needs.draft else targets)
    for lists in (part.entries.kept(), part.entries.standing()):
        library.module.loss_sparse_hidden(
            library.table, *map(address, (*lists, head, part.group.gradient)), 0, 0, 0, *wanted, d, STRIP, block.start,
            len(head), True, library.threads,
        )  # fmt: skip
    part.mean_head.addmv_(head.T, part.entries.left_out_share[block])


def _write_head(parts: list[_Part], results: Results, block: slice, library: Native) -> None:
    """The block of dW and of the bias's gradient, summed over the groups in float32."""
    out = None if results.grad_weight is None else results.grad_weight[block]
    exact = out if out is None or out.dtype is torch.float32 else new_output(*out.shape)
    for number, part in enumerate(parts):
        tensors = (*part.entries.kept(), part.strips, exact, part.entries.left_out, part.mean_hidden, results.grad_bias)
        library.module.loss_sparse_head(
            library.table, *map(address, tensors), 0, *part.group.hidden.shape, STRIP, block.start,
            block.stop - block.start, number > 0, library.threads,
        )  # fmt: skip
    if out is not None and exact is not None and exact is not out:
        out.copy_(exact)
