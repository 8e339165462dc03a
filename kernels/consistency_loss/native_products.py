"""The three products of the consistency loss on a CPU: logits = h W^T, dh = G W, dW = G^T h, a block of W's rows at a time.

By PyTorch's BLAS in float32; bfloat16 on a processor that multiplies it, by the C++ kernels with float32 sums. There hidden
states and head are multiplied as they came, so that logits lose nothing, and G is rounded after the subtraction in it.
"""

from typing import Protocol

import torch
from torch import Tensor

from engine.kernels.linear import PANEL
from engine.kernels.native import Native, new_output

_BFLOAT16 = 1  # WeightType in csrc/kernels.h
DEPTH = 128  # products a BLAS adds up in a row: chains of its own choice lose up to a factor 1.6 in the logits and gain no time


class Products(Protocol):
    """Of one group's hidden states [rows, d] with the block of the head that was taken last."""

    def take(self, head: Tensor) -> None:
        """head: [count, d] as the caller has it."""

    def logits(self, rows: slice, out: Tensor) -> None:
        """out [rows, count] = hidden[rows] head^T."""

    def add_to_hidden(self, gradient: Tensor, out: Tensor) -> None:
        """out [rows, d] += gradient [rows, count] head."""

    def head_gradient(self, gradient: Tensor, out: Tensor, *, accumulate: bool) -> None:
        """out [count, d] (+)= gradient^T hidden; what is no float32 is rounded once, and not accumulated."""


def products(hidden: Tensor, dtype: torch.dtype, block: int, library: Native) -> Products:
    """``hidden``: the group's, float32; ``dtype``: the problem's; ``block``: rows of the head at most."""
    return (PairProducts if in_pairs(dtype, library) else BlasProducts)(hidden, block, library)


def in_pairs(dtype: torch.dtype, library: Native) -> bool:
    return dtype is torch.bfloat16 and library.multiplies_bfloat16


def held_bytes(dtype: torch.dtype, rows: int, block: int, d: int, library: Native) -> int:
    """What products with all gradients hold at most, hidden states aside."""
    if in_pairs(dtype, library):
        return 8 * block * d + 2 * rows * (d + max(d, block))  # the C++ kernel regroups the rows that it multiplies
    return 0 if dtype is torch.float32 else 8 * block * d


class BlasProducts:
    def __init__(self, hidden: Tensor, block: int, library: Native) -> None:
        self._hidden = hidden
        # memory that nothing is written to costs nothing
        self._converted, self._unrounded = (new_output(block, hidden.shape[1]) for _ in range(2))
        self._given = hidden[:0]
        self._head: Tensor | None = None

    def take(self, head: Tensor) -> None:
        self._given, self._head = head, head if head.dtype is torch.float32 else None

    def logits(self, rows: slice, out: Tensor) -> None:
        hidden, head = self._hidden[rows], self._float_head()
        torch.mm(hidden[:, :DEPTH], head[:, :DEPTH].T, out=out)
        for start in range(DEPTH, hidden.shape[1], DEPTH):
            part = slice(start, start + DEPTH)
            out.addmm_(hidden[:, part], head[:, part].T)

    def add_to_hidden(self, gradient: Tensor, out: Tensor) -> None:
        out.addmm_(gradient, self._float_head())

    def head_gradient(self, gradient: Tensor, out: Tensor, *, accumulate: bool) -> None:
        if out.dtype is not torch.float32:
            out.copy_(torch.mm(gradient.T, self._hidden, out=self._unrounded[: len(out)]))
        elif accumulate:
            out.addmm_(gradient.T, self._hidden)
        else:
            torch.mm(gradient.T, self._hidden, out=out)

    def _float_head(self) -> Tensor:
        if self._head is None:
            self._head = self._converted[: len(self._given)].copy_(self._given)
        return self._head


class PairProducts:
    """Each product wants its second operand packed in pairs of what it adds up over: d, rows of the head, rows of the group."""

    def __init__(self, hidden: Tensor, block: int, library: Native) -> None:
        (rows, d), self._library = hidden.shape, library
        self._hidden, self._given = hidden, hidden[:0]
        self._along_d = _packed(block, d)
        self._along_head = _packed(d, block)
        self._along_rows = _packed(d, rows)
        self._unrounded = new_output(block, d)
        self._ready: set[str] = set()

    def take(self, head: Tensor) -> None:
        self._given = head.contiguous()
        self._ready -= {"logits", "hidden"}

    def logits(self, rows: slice, out: Tensor) -> None:
        count, d = self._given.shape
        if self._missing("logits"):
            self._library.module.pack_weight(
                self._given.data_ptr(), self._along_d.data_ptr(), count, d, 0, _BFLOAT16, self._library.threads
            )
        self._multiply(self._hidden[rows], self._along_d, out, accumulate=False)

    def add_to_hidden(self, gradient: Tensor, out: Tensor) -> None:
        if self._missing("hidden"):
            self._pack_transposed(self._given, self._along_head)
        self._multiply(gradient, self._along_head, out, accumulate=True)

    def head_gradient(self, gradient: Tensor, out: Tensor, *, accumulate: bool) -> None:
        if self._missing("head"):
            self._pack_transposed(self._hidden.bfloat16(), self._along_rows)
        exact = self._unrounded[: len(out)]
        self._multiply(gradient.T, self._along_rows, exact, accumulate=False)
        out.copy_(exact)

    def _missing(self, name: str) -> bool:
        missing = name not in self._ready
        self._ready.add(name)
        return missing

    def _pack_transposed(self, matrix: Tensor, packed: Tensor) -> None:
        arguments = (matrix.data_ptr(), packed.data_ptr(), *matrix.shape, self._library.threads)
        self._library.module.pack_transposed(*arguments)

    def _multiply(self, x: Tensor, packed: Tensor, out: Tensor, *, accumulate: bool) -> None:
        """out [m, n] (+)= x [m, k] times what was packed."""
        (m, k), n, library = x.shape, out.shape[1], self._library
        library.module.product(
            library.table, x.data_ptr(), packed.data_ptr(), out.data_ptr(), m, n, k, *x.stride(), out.stride(0), accumulate,
            library.threads,
        )  # fmt: skip


def _packed(rows: int, columns: int) -> Tensor:
    """Memory for a weight; zero where an odd number of columns leaves a pair incomplete."""
    return torch.zeros(-(-rows // PANEL), -(-columns // 2), PANEL, 2, dtype=torch.bfloat16, device="cpu")
