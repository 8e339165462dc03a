"""Tiles of the projection to the vocabulary, for kernels that keep of every tile only what they are after."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.consistency_loss.triton_math import half_of

EMPTY = tl.constexpr(0x7FFFFFFF)
"""Index of a tile or row without a number in it; larger than all others, so that the lowest index is never this one."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the product is divided among programs."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    weight_first: bool
    """The product is weight x hidden, transposed after: tensor cores take 64 weight rows by as few as 8 hidden ones."""
    parts: int
    """Of a tile's columns, one after the other, where what is made of a logit takes more registers than it does."""

    def grid(self, rows: int, vocabulary: int) -> tuple[int]:
        return (triton.cdiv(rows, self.rows) * triton.cdiv(vocabulary, self.columns),)

    def options(self, hidden: Tensor) -> dict[str, int | bool]:
        """Keyword arguments of a kernel's launch."""
        return {
            "ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth, "EVEN": hidden.shape[1] % self.depth == 0,
            "WEIGHT_FIRST": self.weight_first, "PARTS": self.parts,
            "WIDEN": hidden.is_cpu,  # Triton's interpreter multiplies the bits of bfloat16 as integers
            "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip


FEW_ROWS = {
    # streams the weight: two programs of 64 to 100 KiB fit into a multiprocessor, most of that on its way from memory
    16: Tiles(16, 64, 128, 4, 5, True, 1),
    32: Tiles(32, 64, 128, 4, 4, True, 1),
    64: Tiles(64, 64, 128, 4, 3, True, 1),
    # two programs of 96 KiB per multiprocessor: one multiplies while the other fills its pipeline or looks for its maxima
    128: Tiles(128, 128, 64, 8, 3, False, 8),
}
MANY_ROWS = Tiles(128, 256, 64, 8, 3, False, 8)
"""85 multiply-adds per byte from the L2 cache, a third more than a square tile of 128; 144 KiB fit the three chips."""
SMALL_FEW_ROWS = Tiles(16, 64, 32, 4, 2, True, 1)
SMALL_MANY_ROWS = Tiles(64, 64, 32, 4, 2, False, 4)
"""For float32, whose products run without tensor cores, and for rows that are not aligned to 16 elements, so that every
element is loaded on its own: the addresses and sums of larger tiles would not fit the registers."""


def tiles(rows: int, d: int, dtype: torch.dtype) -> Tiles:
    """The same for sm_80, sm_90 and sm_100: chosen by arithmetic and by the registers and shared memory of the compiled
    kernels; not by measurement."""
    if dtype == torch.float32 or d % 16:
        return SMALL_FEW_ROWS if rows <= SMALL_FEW_ROWS.rows else SMALL_MANY_ROWS
    return next((tile for most, tile in FEW_ROWS.items() if rows <= most), MANY_ROWS)


@triton.jit
def product_tile(
    hidden: tl.tensor, weight: tl.tensor, rows: tl.tensor, columns: tl.tensor, d: tl.tensor, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, WEIGHT_FIRST: tl.constexpr, WIDEN: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """hidden[rows] x weight[columns], all of which exist -> float32 [ROWS, COLUMNS]."""
    k = tl.arange(0, DEPTH)
    x_at, w_at = hidden + rows.to(tl.int64) * d, weight + columns.to(tl.int64) * d
    if WEIGHT_FIRST:
        a_at, b_at = w_at[:, None] + k[None, :], x_at[None, :] + k[:, None]
        z = tl.zeros((COLUMNS, ROWS), tl.float32)
    else:
        a_at, b_at = x_at[:, None] + k[None, :], w_at[None, :] + k[:, None]
        z = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, d, DEPTH):
        if EVEN:
            a, b = tl.load(a_at + start), tl.load(b_at + start)
        else:
            a = tl.load(a_at + start, mask=k[None, :] < d - start, other=0.0)
            b = tl.load(b_at + start, mask=k[:, None] < d - start, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        z = tl.dot(a, b, z, input_precision="ieee")
    return tl.trans(z) if WEIGHT_FIRST else z


@triton.jit
def part_of(tile: tl.tensor, PART: tl.constexpr, PARTS: tl.constexpr) -> tl.tensor:
    """Columns of the tile's PARTth part."""
    if PARTS == 1:
        return tile
    elif PARTS == 4:
        return half_of(half_of(tile, PART // 2), PART % 2)
    else:
        return half_of(half_of(half_of(tile, PART // 4), PART // 2 % 2), PART % 2)


@triton.jit
def rows_in_use(row_count: tl.tensor, rows: tl.tensor, HAS_COUNT: tl.constexpr) -> tl.tensor:
    if HAS_COUNT:
        return tl.minimum(tl.load(row_count), rows)
    else:
        return rows


@triton.jit
def lowest(found: tl.tensor, index: tl.tensor) -> tl.tensor:
    """Of every row the lowest index [1, COLUMNS] where ``found``."""
    return tl.min(tl.where(found, index, EMPTY), 1)


@triton.jit
def wins(top: tl.tensor, index: tl.tensor, other: tl.tensor, other_index: tl.tensor) -> tl.tensor:
    """Where the other value takes the place of the largest so far."""
    return (other > top) | ((other == top) & (other_index < index))
