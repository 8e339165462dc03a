"""The packed rows of one forward pass."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.kernels import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Feed:
    """The rows of one sequence: ``tokens`` at consecutive positions from ``position``."""

    tokens: list[int]
    position: int
    pages: list[int]
    logit_start: int
    """First of these rows whose prediction is wanted; len(tokens): none is."""


def staged(values: Tensor, device: torch.device) -> Tensor:
    """``values`` in memory from which a copy to a GPU waits for nobody: from other memory the host would wait until all that
    was launched before, such as a step of the device loop, is done."""
    return values.pin_memory() if device.type == "cuda" else values


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Rows of different sequences side by side on one axis of length t, no padding anywhere."""

    token_ids: Tensor
    """[t] int64."""
    positions: Tensor
    """[t] int64."""
    slots: Tensor
    """[t] int64: page * PAGE_SIZE + offset of every row's K/V."""
    row_start: Tensor
    """[sequences + 1] int32."""
    first_position: Tensor
    """[sequences] int32."""
    block_table: Tensor
    """[sequences, most pages] int32."""
    logit_rows: Tensor | None
    """[r] int64: the rows whose next token is predicted; None: all."""
    end: int
    """One more than the largest position; known without asking the device."""

    @classmethod
    def pack(cls, feeds: list[Feed], device: torch.device) -> "StepBatch":
        counts = np.array([len(feed.tokens) for feed in feeds])
        row_start = np.concatenate(([0], np.cumsum(counts)))
        first = np.array([feed.position for feed in feeds])
        table = np.zeros((len(feeds), max(len(feed.pages) for feed in feeds)), dtype=np.int32)
        for row, feed in enumerate(feeds):
            table[row, : len(feed.pages)] = feed.pages
        sequence = np.repeat(np.arange(len(feeds)), counts)
        positions = np.arange(row_start[-1]) - row_start[sequence] + first[sequence]
        slots = table[sequence, positions // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + positions % PAGE_SIZE
        tokens = np.array([token for feed in feeds for token in feed.tokens], dtype=np.int64)
        logit_rows = np.concatenate(
            [np.arange(row_start[i] + feed.logit_start, row_start[i + 1]) for i, feed in enumerate(feeds)]
        )

        def tensor(array: np.ndarray, dtype: type = np.int64) -> Tensor:
            values = torch.from_numpy(array.astype(dtype, copy=False))
            return staged(values, device).to(device, non_blocking=device.type == "cuda")

        return cls(
            token_ids=tensor(tokens),
            positions=tensor(positions),
            slots=tensor(slots),
            row_start=tensor(row_start, np.int32),
            first_position=tensor(first, np.int32),
            block_table=tensor(table, np.int32),
            logit_rows=tensor(logit_rows),
            end=int(positions.max()) + 1,
        )
