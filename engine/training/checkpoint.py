"""The folder of a training run: whole checkpoints only, a lock and a record of what the run is, the latest to go on from."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.job.output import Claim, Refused, Settings, difference, read_record

MODEL = "model"
"""The finished refiner, in the folder of its run."""
_PARTIAL = ".partial-"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def claim_run(output: Path, settings: Settings, *, overwrite: bool) -> Claim:
    """Takes the folder for this process, until the claim is closed; nothing in it is changed yet.

    Raises Refused where the folder holds another run, this one finished, or files that are no run's; OSError.
    """
    if output.exists() and not output.is_dir():
        raise Refused(f"output {output} is a file: give a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / "run.job").exists():
        raise Refused(f"output {output} holds files and is not the folder of a training run: give another one")
    output.mkdir(parents=True, exist_ok=True)
    claim = Claim(output / "run")
    changed = difference(claim.settings, settings)
    reason = None
    if changed and (claim.complete or checkpoints(output)):
        reason = f"holds another run ({changed}): go on with its settings, give another output, or overwrite=true"
    elif claim.complete:
        reason = f"holds this run, finished: its refiner is in {output / MODEL}; overwrite=true trains anew"
    if reason and not overwrite:
        claim.close()
        raise Refused(f"output {output} {reason}")
    return claim


def resume_point(output: Path, settings: Settings) -> Path | None:
    """The checkpoint to go on from, None where the run starts anew; every process finds the same before ``begin_run``."""
    recorded, complete = read_record(output / "run")
    if difference(recorded, settings) or complete is not None or not output.is_dir():
        return None
    return next(reversed(checkpoints(output)), None)


def begin_run(output: Path, claim: Claim, settings: Settings) -> None:
    """Records the run, and clears its folder of what a crash, a finished run or another one has left there."""
    fresh = resume_point(output, settings) is None
    for path in output.iterdir():
        if path.name.startswith(_PARTIAL) or (fresh and path != claim.path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if fresh:
        claim.begin(settings)


def checkpoints(output: Path) -> list[Path]:
    """The whole ones of a run, oldest first."""
    found = [(int(match[1]), path) for path in output.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


@contextmanager
def published(folder: Path, *, writes: bool = True, wait: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Gives a folder beside to write to, which takes its name and place once everything is on the disk.

    With several processes each is given the same one; only that which ``writes`` renames it, when all have come to
    ``wait``.
    """
    partial = folder.with_name(_PARTIAL + folder.name)
    if writes:
        _remove(partial)
        partial.mkdir()
    wait()
    yield partial
    wait()
    if writes:
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        _remove(folder)
        partial.rename(folder)
        _sync(folder.parent)
    wait()


def remove_old(output: Path, keep: int) -> None:
    """All but the last ``keep`` checkpoints; a name is gone before the first of its files is."""
    for path in checkpoints(output)[:-keep]:
        _remove(path)


def _remove(folder: Path) -> None:
    if folder.exists():
        dying = folder.with_name(_PARTIAL + "old")
        shutil.rmtree(dying, ignore_errors=True)
        folder.rename(dying)
        shutil.rmtree(dying)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
