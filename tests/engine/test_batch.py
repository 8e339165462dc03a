"""Packing of rows, and their way to the device."""

import pytest
import torch
from torch import Tensor

from engine.batch import Feed, StepBatch
from engine.kernels import PAGE_SIZE

FEEDS = [Feed([7, 8, 9], PAGE_SIZE - 1, [4, 2], 1), Feed([5], 0, [3], 1), Feed([6, 6], 70, [0, 5, 1], 0)]


def test_rows_side_by_side() -> None:
    batch = StepBatch.pack(FEEDS, torch.device("cpu"))
    assert batch.token_ids.tolist() == [7, 8, 9, 5, 6, 6]
    assert batch.positions.tolist() == [31, 32, 33, 0, 70, 71]
    pages = [4, 2, 2, 3, 1, 1]
    assert batch.slots.tolist() == [
        p * PAGE_SIZE + i % PAGE_SIZE for p, i in zip(pages, [31, 32, 33, 0, 70, 71], strict=True)
    ]
    assert batch.row_start.tolist() == [0, 3, 4, 6]
    assert batch.first_position.tolist() == [31, 0, 70]
    assert batch.block_table.tolist() == [[4, 2, 0], [3, 0, 0], [0, 5, 1]]
    assert batch.logit_rows is not None
    assert batch.logit_rows.tolist() == [1, 2, 4, 5]
    assert batch.end == 72


def test_the_host_does_not_wait_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every copy is an asynchronous one, from pinned memory."""
    pinned: list[Tensor] = []
    copies: list[Tensor] = []

    def pin(values: Tensor) -> Tensor:
        pinned.append(values)
        return values

    def to(values: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        assert non_blocking
        copies.append(values)
        return values

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    StepBatch.pack(FEEDS, torch.device("cuda"))
    assert list(map(id, copies)) == list(map(id, pinned))
    assert len(copies) == 7
