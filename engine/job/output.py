"""The output file of a job: whole lines only, a lock and a record of how they were made beside it, repair after a crash."""

import json
import os
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: two processes on one output go unnoticed there
    fcntl = None  # type: ignore[assignment]

from engine.job.rows import OWN_FIELDS

RECORD_SUFFIX = ".job"
_MOST = 1 << 24  # bytes read of a record
_MOST_ROWS = 1 << 32  # an index above is damage, and would cost its size in memory
_CHANGED = frozenset((*OWN_FIELDS, "output", "generator", "choices", "model_id"))

Settings = dict[str, Any]
"""What decides the bytes of an output: a JSON object of JSON objects."""


class Refused(ValueError):
    """The job cannot start on this output; nothing was changed."""


def record_path(output: Path) -> Path:
    """Where the record of an output lies."""
    return output.with_name(output.name + RECORD_SUFFIX)


class Claim:
    """The file beside an output that says how its rows were made; locked as long as a process writes them.

    It is one line of JSON with the settings, and a second one once every row is there, which also says how often the
    output was put together from parts.
    """

    def __init__(self, output: Path, *, wait: bool = False) -> None:
        """Takes the lock. Raises Refused when another process has it, unless ``wait``, and OSError."""
        self.path = record_path(output)
        self._output = output
        while True:
            try:
                self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise Refused(f"cannot write beside {output}: {error}") from error
            try:
                if fcntl:
                    fcntl.flock(self._fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if os.fstat(self._fd).st_nlink:  # else its last owner has just removed it
                    break
            except BlockingIOError:
                os.close(self._fd)
                raise Refused(f"another process is writing {output}: wait for it, or give another --output") from None
            except BaseException:
                os.close(self._fd)
                raise
            os.close(self._fd)
        self.settings, end = _read_record(self._fd)
        self.complete = end is not None
        self.merges = end or 0

    def begin(self, settings: Settings) -> None:
        """Records how the rows to come are made; before the first of them."""
        self.reopen()  # or the new settings could stand before the end of the old ones' rows
        self._write(_lines(settings))
        self.settings = settings

    def finish(self, rows: int, merges: int = 0) -> None:
        """Records that all rows are there."""
        assert self.settings is not None
        # both lines: a part of the second may stand there already
        self._write(_lines(self.settings, {"complete": rows, "merges": merges}))
        self.complete, self.merges = True, merges

    def reopen(self) -> None:
        """Takes back ``finish``."""
        self._check_still_there()
        if self.complete:
            os.ftruncate(self._fd, os.pread(self._fd, _MOST, 0).index(b"\n") + 1)
            self.complete, self.merges = False, 0

    def _check_still_there(self) -> None:
        if not os.fstat(self._fd).st_nlink:
            raise OSError(f"{self.path} was removed while rows were written: run the command again")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._fd)  # and with it the lock

    def __enter__(self) -> "Claim":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.settings is None:
            self.remove()  # nothing came of it
        self.close()

    def _write(self, text: bytes) -> None:
        self._check_still_there()
        at = 0
        while at < len(text):  # before it is cut to size: there is no moment without a record
            at += os.pwrite(self._fd, text[at:], at)
        os.ftruncate(self._fd, len(text))
        os.fsync(self._fd)


def _lines(*objects: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in objects)


def _read_record(fd: int) -> tuple[Settings | None, int | None]:
    settings, end = [_read_line(line) for line in (*os.pread(fd, _MOST, 0).split(b"\n"), b"")[:2]]
    return settings, None if settings is None or end is None or "complete" not in end else end.get("merges", 0)


def _read_line(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_record(output: Path) -> tuple[Settings | None, int | None]:
    """The settings an output was made with (None: not made by a job) and, if it is complete, how often it was put together
    from parts; without the lock."""
    try:
        fd = os.open(record_path(output), os.O_RDONLY)
    except FileNotFoundError:
        return None, None
    try:
        return _read_record(fd)
    finally:
        os.close(fd)


def base_of(settings: Settings | None) -> int:
    """For a part: after how many merges of its output it was begun; parts of different ones do not belong together."""
    return settings["plan"].get("base", 0) if settings else 0


def difference(before: Settings | None, now: Settings) -> str | None:
    """What changed between the settings of two runs, in words; None: nothing. ``plan`` is how they are carried out."""
    if before is None:
        return "there is no record of how it was made"
    for part in sorted({*before, *now} - {"plan"}):
        old, new = before.get(part), now.get(part)
        if old == new:
            continue
        if not (isinstance(old, dict) and isinstance(new, dict)):
            return f"{part} {old!r}, now {new!r}"
        names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        if names == ["digest"]:
            return f"another content of the {part}"
        return ", ".join(
            f"{part} {name} {old.get(name)!r}, now {new.get(name)!r}" for name in names if name != "digest"
        )
    return None


@dataclass(frozen=True, slots=True)
class Finished:
    """A row that an output file holds."""

    index: int
    line: bytes
    failed: bool
    fields: dict[str, Any]
    end: int
    """Where the line ends in the file."""

    @property
    def identity(self) -> int:
        """Checksum of its id and carried fields; 0 for an error row, which may have lost them."""
        return 0 if self.failed else identity(self.fields)


def identity(row: dict[str, Any]) -> int:
    """Checksum of what an output row takes over from its input row."""
    kept = {name: value for name, value in row.items() if name not in _CHANGED}
    return zlib.crc32(json.dumps([row.get("id"), kept], sort_keys=True).encode())


def read_finished(path: Path) -> Iterator[Finished]:
    """The rows of an output file, up to a torn last one. Raises Refused where a line is not a row of a job's output."""
    with path.open("rb", 1 << 20) as file:
        pending: str | None = None
        end = 0
        for number, line in enumerate(file, 1):
            if pending:
                raise Refused(pending)  # only the last line can be torn
            end += len(line)
            text = line.rstrip()
            if text in (b"[", b"]"):  # of a JSON array
                continue
            try:
                row = json.loads(text.removesuffix(b","))
                index, failed = row["index"], row["error"] is not None
                if type(index) is not int or not 0 <= index < _MOST_ROWS or not line.endswith(b"\n"):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                pending = (
                    f"{path}, line {number}, is not a row of this job's output: move the file away or use --overwrite"
                )
                continue
            yield Finished(index, text.removesuffix(b",") + b"\n", failed, row, end)


class Done:
    """Which rows are finished, by index; a byte a row, five with ``identities``."""

    def __init__(self, identities: bool) -> None:
        self._identities = array("I") if identities else None
        self._known = bytearray()
        self.count = 0

    def add(self, row: Finished) -> None:
        missing = row.index + 1 - len(self._known)
        if missing > 0:
            self._known.extend(bytes(missing))
        self.count += not self._known[row.index]
        self._known[row.index] = 1
        if self._identities is not None:
            self._identities.extend([0] * (len(self._known) - len(self._identities)))
            self._identities[row.index] = row.identity

    @property
    def last(self) -> int:
        """The highest index; -1: there is none."""
        return len(self._known) - 1

    def __contains__(self, index: int) -> bool:
        return index < len(self._known) and bool(self._known[index])

    def identity(self, index: int) -> int:
        return self._identities[index] if self._identities is not None else 0
