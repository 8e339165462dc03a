"""Linear projection over weights stored in the layout of the implementation that reads them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.native import Impl, address, choose, is_native_index, is_native_layout, native, new_output

PANEL = 32  # output columns side by side in the packed layout; kPanel in csrc/kernels.h
CPU_ROW_MULTIPLE = 16  # see _reference
WEIGHT_TYPES = {torch.float32: 0, torch.bfloat16: 1}  # WeightType in csrc/kernels.h


def panel_shape(columns: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Of 32 rows of a packed weight; those of 16 bits lie in pairs of columns, the last one filled up with zeros."""
    return (columns, PANEL) if dtype is torch.float32 else (-(-columns // 2), PANEL, 2)


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """A projection matrix of ``rows`` outputs by ``columns`` inputs.

    ``packed``: ``data`` is what the C++ kernel streams on a CPU, [ceil(rows / 32), columns, 32] in float32, in bfloat16
    [ceil(rows / 32), ceil(columns / 2), 32, 2]; otherwise it is the plain [rows, columns]. Both hold the matrix once.
    """

    data: Tensor
    rows: int
    columns: int
    packed: bool

    @classmethod
    def allocate(cls, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> "LinearWeight":
        """Storage for a matrix that ``write`` fills piece by piece; packed where the C++ kernel will read it."""
        packed = device.type == "cpu" and dtype in WEIGHT_TYPES and native() is not None
        if packed:
            data = torch.zeros(-(-rows // PANEL), *panel_shape(columns, dtype), dtype=dtype, device=device)
        else:
            data = torch.empty(rows, columns, dtype=dtype, device=device)
        return cls(data, rows, columns, packed)

    @classmethod
    def from_dense(cls, matrix: Tensor) -> "LinearWeight":
        """Packs (or, where there is no C++ kernel, copies) a [rows, columns] matrix."""
        weight = cls.allocate(matrix.shape[0], matrix.shape[1], matrix.dtype, matrix.device)
        weight.write(0, matrix)
        return weight

    def write(self, first_row: int, matrix: Tensor) -> None:
        """Stores ``matrix`` [n, columns] as rows first_row .. first_row + n; it is cast to the weight's dtype."""
        if matrix.shape[1:] != (self.columns,) or not 0 <= first_row <= self.rows - matrix.shape[0]:
            raise ValueError(
                f"a [{self.rows}, {self.columns}] weight cannot take {tuple(matrix.shape)} at row {first_row}"
            )
        if not self.packed:
            self.data[first_row : first_row + matrix.shape[0]].copy_(matrix)
            return
        library = native()
        assert library is not None
        source = matrix.detach().to(self.data).contiguous()
        kind, threads = WEIGHT_TYPES[self.data.dtype], library.threads
        library.module.pack_weight(
            source.data_ptr(), self.data.data_ptr(), source.shape[0], self.columns, first_row, kind, threads
        )

    def takes(self, x: Tensor, bias: Tensor | None) -> bool:
        """Whether the C++ kernel can multiply ``x`` [m, columns] by this weight and add ``bias`` [rows]."""
        shapes_fit = x.shape[1:] == (self.columns,) and (bias is None or bias.shape == (self.rows,))
        return self.packed and shapes_fit and is_native_layout(x, bias)

    def dense(self) -> Tensor:
        """The plain [rows, columns] matrix (a copy when packed); for references and tests."""
        if not self.packed:
            return self.data
        rows = self.data.transpose(1, 2).flatten(2)  # from [columns, 32], or pairs of columns [.., 32, 2], of a panel
        return rows.reshape(-1, rows.shape[-1])[: self.rows, : self.columns]


def linear(x: Tensor, weight: LinearWeight, bias: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """``x @ weight.T + bias``: x [m, columns] -> [m, rows], float32 with a packed weight.

    With the C++ kernel a row of the result has the same bits whatever the other rows are and however many. Where the processor
    multiplies bfloat16 (``native_name()`` is ``avx512_bf16``) x is rounded to it for a bfloat16 weight, as PyTorch's own is.
    """
    library = choose(impl, weight.takes(x, bias), "a packed weight and contiguous float32 inputs of its shape")
    if library is None:
        return _reference(x, weight, bias)
    m, n = x.shape[0], weight.rows
    y = new_output(m, n)
    library.module.linear(
        library.table, x.data_ptr(), weight.data.data_ptr(), address(bias), y.data_ptr(), m, n, weight.columns,
        WEIGHT_TYPES[weight.data.dtype], library.threads,
    )  # fmt: skip
    return y


def _reference(x: Tensor, weight: LinearWeight, bias: Tensor | None) -> Tensor:
    matrix = weight.dense().to(x.dtype)
    pad = -x.shape[0] % CPU_ROW_MULTIPLE if x.device.type == "cpu" else 0
    if pad == 0:
        return F.linear(x, matrix, bias)
    # BLAS libraries pick other kernels, and so another order of summation, for few rows; with a multiple of 16 rows the
    # bits of a row are the same for neighbouring counts. They change where the library changes its blocking: MKL did at
    # 64, 128 or 192 rows with 896 columns.
    return F.linear(F.pad(x, (0, 0, 0, pad)), matrix, bias)[: x.shape[0]]


def embedding(ids: Tensor, weight: LinearWeight, scale: float = 1.0, *, impl: Impl = "auto") -> Tensor:
    """Rows ``ids`` [n] int64 of the matrix times ``scale`` -> [n, columns]; a tied head is read in its own layout."""
    library = choose(
        impl,
        weight.packed and ids.dim() == 1 and is_native_index(torch.int64, ids),
        "a packed weight and contiguous int64 ids [n]",
    )
    if library is None:
        rows = weight.dense()[ids]
        return rows.float() * scale if weight.packed else rows * scale
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < weight.rows:
        raise IndexError(f"embedding ids must be in 0 .. {weight.rows - 1}, got {int(ids.min())} .. {int(ids.max())}")
    out = new_output(ids.shape[0], weight.columns)
    library.module.embed(
        ids.data_ptr(), weight.data.data_ptr(), out.data_ptr(), ids.shape[0], weight.columns, scale,
        WEIGHT_TYPES[weight.data.dtype],
    )  # fmt: skip
    return out
