"""What a training run reads: trajectories that fit the model, and the order in which they come."""

import logging
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset, Sampler

from engine.errors import InvalidTrajectory
from engine.training.collator import TrajectoryCollator
from engine.training.layout import Trajectory, rank

if TYPE_CHECKING:
    from engine.trajectories.schema import BadRow

logger = logging.getLogger("engine.training")


class Trajectories(Dataset[tuple[int, Trajectory]]):
    """Ranked trajectories, each with its place."""

    def __init__(self, trajectories: Sequence[Trajectory]) -> None:
        self.trajectories = list(trajectories)

    def __len__(self) -> int:
        return len(self.trajectories)

    def __getitem__(self, index: int) -> tuple[int, Trajectory]:
        return index, self.trajectories[index]


@dataclass(frozen=True, slots=True)
class BatchCollator:
    """The ``collate_fn`` of the trainer: ``batch`` for train_step; ``rows`` [trajectories], their places in the data set;
    and ``input_ids`` [B, L] of the batch once more, by which transformers counts."""

    collator: TrajectoryCollator

    def __call__(self, rows: Sequence[tuple[int, Trajectory]]) -> dict[str, Any]:
        batch = self.collator([trajectory for _, trajectory in rows])
        return {"input_ids": batch["input_ids"], "batch": batch, "rows": torch.tensor([index for index, _ in rows])}


class EpochBatches(Sampler[list[int]]):
    """Places of the trajectories of one process's micro-batches, in an order that (seed, epoch) alone decide.

    Every optimiser step takes ``batch_size`` trajectories, process r of n the places r, r + n, .. of them: how many
    processes there are changes who computes what, not what is learned. Those left over at the end of an epoch are
    dropped.
    """

    def __init__(
        self, count: int, batch_size: int, micro_batch: int, *, seed: int, process: int, processes: int
    ) -> None:
        self.count, self.batch_size, self.micro_batch = count, batch_size, micro_batch
        self.seed, self.process, self.processes = seed, process, processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Makes the order that of another pass over the data."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // self.batch_size * (self.batch_size // self.processes // self.micro_batch)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        for start in range(0, self.count - self.batch_size + 1, self.batch_size):
            own = order[start + self.process : start + self.batch_size : self.processes]
            for first in range(0, len(own), self.micro_batch):
                yield own[first : first + self.micro_batch]


class LeftOut:
    """Counts rows that cannot be trained on, and says the first of each kind."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()

    def bad(self, row: "BadRow") -> None:
        """A row that cannot be read."""
        self.add("not usable", str(row))

    def add(self, kind: str, reason: str) -> None:
        """One more of a kind."""
        if not self.kinds[kind]:
            logger.warning("left out: %s", reason)
        self.kinds[kind] += 1

    def __str__(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())


def select(
    trajectories: Iterable[Trajectory],
    left_out: LeftOut,
    *,
    responses: int,
    window: int,
    drafts: int,
    longest_row: int | None,
    positions: int,
    vocabulary: int,
) -> Iterator[Trajectory]:
    """Ranks them, keeps what training reads of each and leaves out those that do not fit a row or the model."""
    for trajectory in trajectories:
        try:
            ranked = thinned(rank(trajectory), responses)
        except InvalidTrajectory as error:
            left_out.add("without a scored response", str(error))
            continue
        prompt, length = len(trajectory.prompt_ids), min(window, len(ranked[-1]))
        most = prompt + length * (1 + min(drafts, len(ranked) - 1))
        named = f"trajectory {trajectory.id!r}"
        largest = max(map(max, (trajectory.prompt_ids, *ranked)))
        if largest >= vocabulary:
            left_out.add("outside the model's vocabulary", f"{named}: token {largest} of {vocabulary}")
        elif prompt + length > positions:
            left_out.add("longer than the model's positions", f"{named}: {prompt + length} tokens > {positions}")
        elif longest_row is not None and most > longest_row:
            left_out.add("longer than max_tokens", f"{named}: {most} tokens > max_tokens={longest_row}")
        else:
            kept = [array("i", response[:window]) for response in ranked]
            yield Trajectory(id=trajectory.id, prompt_ids=array("i", trajectory.prompt_ids), responses=kept)


def thinned(ranked: Sequence[list[int]], most: int) -> list[list[int]]:
    """At most that many of them, evenly spaced, the last (the best) always and, but for most = 1, the first."""
    if len(ranked) <= most:
        return list(ranked)
    if most == 1:
        return [ranked[-1]]
    return [ranked[round(index * (len(ranked) - 1) / (most - 1))] for index in range(most)]


def padded_shares(count: int, size: int, *, process: int, processes: int) -> Iterator[tuple[list[int], bool]]:
    """Places in batches of ``size`` for one process, as many batches for each, and whether a batch counts.

    For evaluation: sharded models need every process in every pass, so those that have run out repeat the first.
    """
    own = list(range(process, count, processes))
    for first in range(0, -(-count // processes), size):
        places = own[first : first + size]
        yield places or [0], bool(places)
