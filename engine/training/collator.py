"""From ranked trajectories to a training batch: draws drafts, packs rows, pads them."""

import hashlib
from collections.abc import Collection, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from engine.errors import InvalidTrajectory
from engine.training.layout import WINDOW, Layout, Trajectory, lay_out, rank


class TrainBatch(TypedDict):
    """Plain int64 tensors; a row index counts through the batch as one axis [B * L]."""

    input_ids: Tensor
    """[B, L]."""
    position_ids: Tensor
    """[B, L]; every response starts at the length of its prompt."""
    trajectory_ids: Tensor
    """[B, L]: which trajectory of the batch a token belongs to, -1 for padding."""
    response_ids: Tensor
    """[B, L]: 0 for the prompt, 1 for the target, from 2 on for the drafts."""
    target_rows: Tensor
    """[M]: rows that predict the targets' tokens."""
    labels: Tensor
    """[M]: these tokens."""
    draft_rows: Tensor
    """[R]: rows of drafts with a divergence."""
    pair_index: Tensor
    """[R] in 0 .. M - 1: the entry of ``target_rows`` that teaches it."""
    label_count: Tensor
    """[]: M, for the denominators of gradient accumulation."""
    pair_count: Tensor
    """[]: R."""


class TrajectoryCollator:
    """A ``collate_fn``: a list of trajectories becomes one ``TrainBatch``.

    ``drafts`` (K) of the responses that are not the target are drawn, uniformly and without repetition; all of them
    where there are fewer, none with 0 (plain fine-tuning). A draw depends on (seed, epoch, id of the trajectory) alone:
    not on the order, the other trajectories, the worker or any global generator, so that a resumed run draws the same.
    Call ``set_epoch`` before each epoch; workers that persist over epochs keep the one they were started with.

    Several trajectories share a row as long as it has at most ``max_tokens`` tokens, first fit in the order given;
    None: one per row. Long rows suit flex_attention, which skips blocks that no query sees; with dense masks ("sdpa",
    "eager") attention costs the square of a row's length, and few trajectories per row are faster. ``eos_ids`` end a
    response; leave them out where the responses are cut already. ``pad_id`` fills short drafts and rows; use the token
    with which the refiner fills guesses. Rows are padded to the longest, rounded up to ``pad_to_multiple``. Raises
    ``InvalidTrajectory`` for one that is malformed or does not fit.
    """

    def __init__(
        self,
        pad_id: int,
        *,
        drafts: int = 1,
        window: int = WINDOW,
        max_tokens: int | None = None,
        seed: int = 0,
        eos_ids: Collection[int] = (),
        pad_to_multiple: int = 1,
    ) -> None:
        for name, value, least in (
            ("pad_id", pad_id, 0),
            ("drafts", drafts, 0),
            ("window", window, 1),
            ("max_tokens", 1 if max_tokens is None else max_tokens, 1),
            ("pad_to_multiple", pad_to_multiple, 1),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        self.pad_id, self.drafts, self.window, self.max_tokens = pad_id, drafts, window, max_tokens
        self.seed, self.eos_ids, self.pad_to_multiple = seed, frozenset(eos_ids), pad_to_multiple
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Makes the draws those of another pass over the data."""
        self.epoch = epoch

    def __call__(self, trajectories: Sequence[Trajectory]) -> TrainBatch:
        if not trajectories:
            raise ValueError("a batch needs at least one trajectory, got none")
        layouts = [self.lay_out(trajectory) for trajectory in trajectories]
        return collate(self._pack(layouts), self.pad_id, pad_to_multiple=self.pad_to_multiple)

    def lay_out(self, trajectory: Trajectory) -> Layout:
        """Ranks one trajectory, draws its drafts and lays them out."""
        *others, target = rank(trajectory, self.eos_ids)
        chosen = [others[index] for index in self.draw(trajectory.id, len(others))]
        layout = lay_out(trajectory.prompt_ids, target, chosen, pad_id=self.pad_id, window=self.window)
        if self.max_tokens is not None and len(layout.input_ids) > self.max_tokens:
            raise InvalidTrajectory(
                f"trajectory {trajectory.id!r} has {len(layout.input_ids)} tokens ({len(trajectory.prompt_ids)} of its "
                f"prompt), a row holds max_tokens={self.max_tokens}; raise it, shorten the prompt or leave the trajectory out"
            )
        return layout

    def draw(self, trajectory_id: str | int, count: int) -> list[int]:
        """At most K of ``count`` indices, ascending: those with the smallest hashes, which no library version changes."""

        def place(index: int) -> bytes:
            return hashlib.sha256(f"{self.seed}/{self.epoch}/{index}/{trajectory_id}".encode()).digest()

        return sorted(sorted(range(count), key=place)[: self.drafts])

    def _pack(self, layouts: list[Layout]) -> list[list[Layout]]:
        if self.max_tokens is None:
            return [[layout] for layout in layouts]
        rows: list[list[Layout]] = []
        room: list[int] = []
        for layout in layouts:
            size = len(layout.input_ids)
            row = next((index for index, free in enumerate(room) if free >= size), len(rows))
            if row == len(rows):
                rows.append([])
                room.append(self.max_tokens)
            rows[row].append(layout)
            room[row] -= size
        return rows


def collate(rows: Sequence[Sequence[Layout]], pad_id: int, *, pad_to_multiple: int = 1) -> TrainBatch:
    """The batch of given rows of layouts; its tensors are in ``TrainBatch``."""
    longest = max(sum(len(layout.input_ids) for layout in row) for row in rows)
    length = -(-longest // pad_to_multiple) * pad_to_multiple
    names = ("input_ids", "position_ids", "trajectory_ids", "response_ids")
    flat: dict[str, list[int]] = {name: [] for name in (*names, "target_rows", "labels", "draft_rows", "pair_index")}
    trajectory = 0
    for index, row in enumerate(rows):
        for layout in row:
            start, first = len(flat["input_ids"]), len(flat["labels"])
            flat["input_ids"] += layout.input_ids
            flat["position_ids"] += layout.position_ids
            flat["trajectory_ids"] += [trajectory] * len(layout.input_ids)
            flat["response_ids"] += layout.response_ids
            flat["target_rows"] += [start + i for i in layout.target_rows]
            flat["labels"] += layout.labels
            flat["draft_rows"] += [start + i for i in layout.draft_rows]
            flat["pair_index"] += [first + i for i in layout.pair_index]
            trajectory += 1
        missing = (index + 1) * length - len(flat["input_ids"])
        for name, value in zip(names, (pad_id, 0, -1, 0), strict=True):
            flat[name] += [value] * missing
    tensors = {name: torch.tensor(values, dtype=torch.int64) for name, values in flat.items()}
    grids = {name: tensors[name].view(len(rows), length) for name in names}
    return TrainBatch(
        input_ids=grids["input_ids"],
        position_ids=grids["position_ids"],
        trajectory_ids=grids["trajectory_ids"],
        response_ids=grids["response_ids"],
        target_rows=tensors["target_rows"],
        labels=tensors["labels"],
        draft_rows=tensors["draft_rows"],
        pair_index=tensors["pair_index"],
        label_count=torch.tensor(len(flat["labels"])),
        pair_count=torch.tensor(len(flat["draft_rows"])),
    )
