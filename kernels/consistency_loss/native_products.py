"""The three products of the consistency loss on a CPU: logits = h W^T, dh = G W, dW = G^T h, a block of W's rows at a time.

In float32, by PyTorch's BLAS or the C++ kernels, whichever is faster; bfloat16 on a processor that multiplies it by the C++
kernels with float32 sums. There hidden states and head are multiplied as they came, so that logits lose nothing, and G is
rounded after the subtraction in it.
"""

import math
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine.kernels.linear import PANEL, WEIGHT_TYPES, panel_shape
from engine.kernels.native import Native, new_output

FEW_ROWS = 64
DEPTH = 128  # products that are added up in a row: the longer chains of others lose up to a factor 1.6 and gain no time


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
    by = native_type(dtype, len(hidden), library)
    return BlasProducts(hidden, block) if by is None else NativeProducts(hidden, by, block, library)


def native_type(dtype: torch.dtype, rows: int, library: Native) -> torch.dtype | None:
    """What the C++ kernels multiply of a problem of ``dtype``; None where a BLAS is the faster one.

    On Intel's processors float32 is best left to MKL. On others it does not use AVX-512. Of few rows a BLAS may add up each in
    an order of its own, which the small differences of a draft from its teacher do not survive: with two threads MKL was off
    by 8e-6 of the gradient's norm.
    """
    if dtype is torch.bfloat16 and library.multiplies_bfloat16:
        return torch.bfloat16
    return torch.float32 if library.outruns_blas or rows <= FEW_ROWS else None


def held_bytes(dtype: torch.dtype, rows: int, block: int, d: int, library: Native) -> int:
    """What products with all gradients hold at most, hidden states aside."""
    by = native_type(dtype, rows, library)
    if by is not None:  # regrouped rows too, of one product at a time
        return 4 * block * d + by.itemsize * (block * d + rows * (d + max(d, block)))
    return 0 if dtype is torch.float32 else 8 * block * d


class BlasProducts:
    def __init__(self, hidden: Tensor, block: int) -> None:
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


class NativeProducts:
    """By the C++ kernels, in float32 or bfloat16 with float32 sums.

    Each product wants its second operand packed along what it adds up over: the head along d for the logits, along its rows
    for dh, hidden states along theirs.
    """

    def __init__(self, hidden: Tensor, dtype: torch.dtype, block: int, library: Native) -> None:
        rows, d = hidden.shape
        self._hidden, self._given, self._dtype, self._library = hidden, hidden[:0], dtype, library
        # memory that nothing is written to costs nothing
        self._packed_head = new_output(max(packed_size(block, d, dtype), packed_size(d, block, dtype)), dtype=dtype)
        self._packed_hidden = new_output(packed_size(d, rows, dtype), dtype=dtype)
        self._unrounded = new_output(block, d)
        self._head_is: Literal["as given", "along d", "along its rows"] = "as given"
        self._hidden_is_packed = False

    def take(self, head: Tensor) -> None:
        self._given, self._head_is = head.to(self._dtype).contiguous(), "as given"

    def logits(self, rows: slice, out: Tensor) -> None:
        if self._head_is != "along d":
            self._pack(self._given, self._packed_head, 0)
            self._head_is = "along d"
        self._multiply(self._hidden[rows], self._packed_head, out, accumulate=False)

    def add_to_hidden(self, gradient: Tensor, out: Tensor) -> None:
        if self._head_is != "along its rows":
            self._pack(self._given, self._packed_head)
            self._head_is = "along its rows"
        self._multiply(gradient, self._packed_head, out, accumulate=True)

    def head_gradient(self, gradient: Tensor, out: Tensor, *, accumulate: bool) -> None:
        if not self._hidden_is_packed:
            self._pack(self._hidden.to(self._dtype), self._packed_hidden)
            self._hidden_is_packed = True
        exact = out if out.dtype is torch.float32 else self._unrounded[: len(out)]
        self._multiply(gradient.T, self._packed_hidden, exact, accumulate=accumulate)
        if exact is not out:
            out.copy_(exact)

    def _pack(self, matrix: Tensor, packed: Tensor, *first_row: int) -> None:
        """As rows from ``first_row`` on, or where that is left out as columns."""
        pack = self._library.module.pack_weight if first_row else self._library.module.pack_transposed
        pointers, kind = (matrix.data_ptr(), packed.data_ptr()), WEIGHT_TYPES[self._dtype]
        pack(*pointers, *matrix.shape, *first_row, kind, self._library.threads)

    def _multiply(self, x: Tensor, packed: Tensor, out: Tensor, *, accumulate: bool) -> None:
        """out [m, n] (+)= x [m, k] times what was packed."""
        (m, k), n, library = x.shape, out.shape[1], self._library
        library.module.product(
            library.table, x.data_ptr(), packed.data_ptr(), out.data_ptr(), m, n, k, *x.stride(), out.stride(0), accumulate,
            DEPTH, WEIGHT_TYPES[self._dtype], library.threads,
        )  # fmt: skip


def packed_size(rows: int, columns: int, dtype: torch.dtype) -> int:
    """Elements of a packed weight; nothing needs to be in them before."""
    return -(-rows // PANEL) * math.prod(panel_shape(columns, dtype))
