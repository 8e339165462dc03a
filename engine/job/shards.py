"""Outputs put together from part files: one for each rank of a data-parallel job, or one for a JSON array.

Ranks share nothing but the file system. Each completes its own part, and the one that finishes last merges them: there is
no collective operation that a dead rank could leave the others waiting in.
"""

import glob
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.job.output import (
    Claim,
    Finished,
    Refused,
    Settings,
    base_of,
    difference,
    read_finished,
    read_record,
    record_path,
)

BUFFER = 1 << 20


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows whose index is ``rank`` modulo ``world``."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} of {self.world}")

    def __contains__(self, index: int) -> bool:
        return index % self.world == self.rank


@dataclass(frozen=True, slots=True)
class Assembly:
    """An output and this process's part of it."""

    output: Path
    shard: Shard

    @property
    def part(self) -> Path:
        return self._part(self.shard.rank)

    def _part(self, rank: int) -> Path:
        return self.output.with_name(f"{self.output.name}.part-{rank:05}-of-{self.shard.world:05}")

    def merges(self, settings: Settings, overwrite: bool) -> int | None:
        """How often the complete output has been put together; None: it is not complete, or to be made anew. Raises Refused
        where it, or a part, is of another job.
        """
        self._check_other_parts(overwrite)
        if overwrite or not self.output.exists() or not self.output.stat().st_size:
            return None
        made_with, merges = read_record(self.output)
        changed = difference(made_with, settings)
        if changed:
            raise Refused(
                f"{self.output} is of another run ({changed}): "
                "give the same model, input and options, another --output, or --overwrite to start anew"
            )
        return merges

    def clear(self, merges: int | None) -> None:
        """Removes this process's part if it is one that a merge left behind; with None in any case."""
        if not record_path(self.part).exists():
            return
        with Claim(self.part) as claim:
            if base_of(claim.settings) != merges:
                _remove(self.part)

    def _check_other_parts(self, overwrite: bool) -> None:
        mine = f"-of-{self.shard.world:05}"
        for path in sorted(self.output.parent.glob(f"{glob.escape(self.output.name)}.part-*")):
            if mine in path.name:
                continue
            if not overwrite:
                raise Refused(
                    f"{path} is a part of a run with another number of ranks: use that number again, or --overwrite"
                )
            path.unlink(missing_ok=True)

    def merge(self, settings: Settings, say: Callable[[str], None]) -> int | None:
        """Puts the output together if every part is complete: the rank that ends last does it. The error rows in the output,
        None where it is not there yet."""
        parts = [self._part(rank) for rank in range(self.shard.world)]
        # waits, so that of two ranks which end together the second sees what the first left
        with Claim(self.output, wait=True) as claim:
            if not self.part.exists():
                return sum(row.failed for row in read_finished(self.output))  # another rank has merged
            base = base_of(read_record(self.part)[0])
            missing = [rank for rank, part in enumerate(parts) if not _is_complete(part, settings, base)]
            if missing:
                say(f"this part is complete, ranks {missing} are not: the one that ends last puts the output together")
                return None
            merges = claim.merges + 1
            if not claim.complete or difference(claim.settings, settings):
                claim.begin(settings)
            new = self.output.with_name(self.output.name + ".merge")
            rows, errors = _write_merged(parts, new, as_array=self.output.suffix == ".json")
            os.replace(new, self.output)
            claim.finish(rows, merges)
            for part in parts:
                _remove(part)
        return errors


def _is_complete(part: Path, settings: Settings, base: int) -> bool:
    made_with, merges = read_record(part)
    return merges is not None and base_of(made_with) == base and difference(made_with, settings) is None


def _remove(part: Path) -> None:
    """Removes a part with all that lies beside it, the record last: without it nobody would know the rest."""
    part.unlink(missing_ok=True)
    for path in part.parent.glob(f"{glob.escape(part.name)}.*"):
        if path != record_path(part):
            path.unlink(missing_ok=True)
    record_path(part).unlink(missing_ok=True)


def _write_merged(parts: list[Path], new: Path, as_array: bool) -> tuple[int, int]:
    number = errors = 0
    with new.open("wb", BUFFER) as file:
        for number, row in enumerate(_in_order(parts), 1):
            errors += row.failed
            if as_array:
                file.write(b"[\n" if number == 1 else b",\n")
                file.write(row.line.rstrip())
            else:
                file.write(row.line)
        if as_array:
            file.write(b"\n]\n" if number else b"[]\n")
        file.flush()
        os.fsync(file.fileno())
    return number, errors


def _in_order(parts: list[Path]) -> Iterator[Finished]:
    if len(parts) == 1:
        yield from read_finished(parts[0])
        return
    files = [read_finished(part) for part in parts]
    index = 0
    while row := next(files[index % len(files)], None):
        if row.index != index:
            raise Refused(
                f"{parts[index % len(files)]} has row {row.index} where {index} belongs: remove it and run again"
            )
        yield row
        index += 1
    if any(next(file, None) for file in files):
        raise Refused(f"a part of {[str(part) for part in parts]} has rows that others lack: remove them and run again")
