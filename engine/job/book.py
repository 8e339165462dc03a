"""The file of finished rows that a job is completing."""

import heapq
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from engine.job.output import Claim, Done, Finished, Refused, Settings, base_of, difference, read_finished
from engine.job.shards import Shard
from engine.job.writer import RowWriter

RETRY_SUFFIX, AHEAD_SUFFIX = ".retry", ".ahead"


@dataclass(frozen=True, slots=True)
class Files:
    """Where a book is kept."""

    rows: Path
    """The finished rows."""
    work: Path
    """Where rows are added; replaces ``rows`` in the end if it is another file."""
    old: Path | None = None
    """An earlier output whose rows are taken over, but for its error rows."""

    @property
    def ahead(self) -> Path:
        """Rows that an interrupted run had finished before earlier ones, in order."""
        return _beside(self.work, AHEAD_SUFFIX)

    @property
    def all_ahead(self) -> set[Path]:
        """The same of every run that may have left some."""
        return {_beside(path, AHEAD_SUFFIX) for path in (self.rows, self.retry)}

    @property
    def retry(self) -> Path:
        return _beside(self.rows, RETRY_SUFFIX)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def open_book(
    rows: Path,
    settings: Settings,
    overwrite: bool = False,
    retry_errors: bool = False,
    merged: Path | None = None,
    shard: Shard | None = None,
) -> "Book":
    """The book kept in the file ``rows``; with ``retry_errors`` its error rows are to be computed again.

    ``merged``: a complete output whose rows of this ``shard`` are taken over, but for its error rows. Raises Refused where
    the file belongs to another job or process. Nothing is changed before ``Book.begin``.
    """
    with ExitStack() as stack:
        claim = stack.enter_context(Claim(rows))
        retry = _beside(rows, RETRY_SUFFIX)
        fresh = _is_fresh(claim, rows, retry, settings, overwrite, retry_errors)
        files = Files(rows, rows, merged)
        if retry_errors and not merged and not fresh and (retry.exists() or _has_errors(rows)):
            files = Files(rows, retry, rows)
        book = Book(settings if fresh or claim.settings is None else claim.settings, files, claim, shard, fresh)
        book.resources.push(stack.pop_all())
        return book


def _is_fresh(claim: Claim, rows: Path, retry: Path, settings: Settings, overwrite: bool, retry_errors: bool) -> bool:
    """Whether to start anew. Raises Refused unless what is in the files belongs to this job or may be overwritten."""
    files = (rows, retry, _beside(rows, AHEAD_SUFFIX), _beside(retry, AHEAD_SUFFIX))
    if not any(path.exists() and path.stat().st_size for path in files):
        return True
    changed = difference(claim.settings, settings)
    left_over = base_of(claim.settings) != base_of(settings)
    if overwrite:
        return bool(changed) or left_over or claim.complete or retry.exists()
    if changed:
        raise Refused(
            f"{rows} holds rows of another run ({changed}): "
            "give the same model, input and options, another --output, or --overwrite to start anew"
        )
    if retry.exists() and not retry_errors:
        raise Refused(f"{retry} is of a run with --retry-errors that was cut short: finish it with --retry-errors")
    return left_over


def _has_errors(rows: Path) -> bool:
    return rows.exists() and any(row.failed for row in read_finished(rows))


class Book:
    """Rows finished before and rows to be added; in a ``with`` block, which gives up the file at its end."""

    def __init__(
        self,
        settings: Settings,
        files: Files | None = None,
        claim: Claim | None = None,
        shard: Shard | None = None,
        fresh: bool = True,
        stream: Path | None = None,
    ) -> None:
        """Without ``files`` rows go to ``stream`` or standard output; ``fresh``: what is in the files is to be dropped."""
        self.resources = ExitStack()
        # a file is known to be the same by its digest, a pipe only row by row
        self.done = Done(identities=settings["input"]["digest"] is None)
        """Rows that need not be computed."""
        self.errors = 0
        """Error rows among them."""
        self.concurrency: int = settings["plan"]["concurrency"]
        self._settings, self._files, self._claim, self._fresh = settings, files, claim, fresh
        self._writer: RowWriter | None = None
        self._stream = stream
        self._size = 0
        self._last = -1  # index of the last row written
        there = Done(identities=False)
        self._kept: Iterator[Finished] = iter(())
        if files and not fresh:
            for row in _read(files.work):
                there.add(row)
                self._count(row)
                self._size = row.end
        if files:
            for row in self._taken_over(files, shard, there):
                self._count(row)
            self._kept = self._taken_over(files, shard, there)
        self._next_kept = next(self._kept, None)

    def _count(self, row: Finished) -> None:
        if row.index not in self.done:
            self.done.add(row)
            self.errors += row.failed

    def _taken_over(self, files: Files, shard: Shard | None, there: Done) -> Iterator[Finished]:
        """In order, the rows of other files that are not in this one yet."""
        sources: list[Iterable[Finished]] = []
        if files.old:
            mine = (row for row in _read(files.old) if shard is None or row.index in shard)
            sources.append(row for row in mine if not row.failed)
        if not self._fresh:
            sources += [_read(path) for path in files.all_ahead]
        last = -1
        for row in heapq.merge(*sources, key=lambda row: row.index):
            if row.index not in there and row.index != last:
                last = row.index
                yield row

    def begin(self, *, all_kept: bool) -> None:
        """Before the first row is written; ``all_kept``: their order among the new ones does not matter."""
        if self._files and self._claim:
            if self._fresh:
                for path in (self._files.retry, *self._files.all_ahead):
                    path.unlink(missing_ok=True)
                if self._files.rows.exists():
                    os.truncate(self._files.rows, 0)
                self._claim.begin(self._settings)
            else:
                self._claim.reopen()
        self._open_writer()
        if all_kept:
            self._write_kept(None)

    def _open_writer(self) -> RowWriter:
        if self._writer is None:
            self._writer = RowWriter(self._files.work if self._files else self._stream, self._size)
            self.resources.callback(self._writer.close)
        return self._writer

    def write(self, index: int, line: bytes) -> None:
        self._write_kept(index)
        self._put(index, line)

    def _put(self, index: int, line: bytes) -> None:
        self._open_writer().write(line)
        self._last = index

    def _write_kept(self, before: int | None) -> None:
        while self._next_kept and (before is None or self._next_kept.index < before):
            self._put(self._next_kept.index, self._next_kept.line)
            self._next_kept = next(self._kept, None)

    def tick(self, *, idle: bool) -> None:
        """Flushes what has waited long enough, or everything if nothing else is going on."""
        self._open_writer().tick(idle=idle)

    def flush(self) -> None:
        self._open_writer().flush()

    def set_aside(self, lines: dict[int, bytes]) -> None:
        """Keeps rows that are finished before earlier ones, by index, for the next run."""
        if not self._files:
            return
        waiting = {row.index: row.line for row in _read(self._files.ahead) if row.index > self._last}
        waiting.update(lines)
        new = _beside(self._files.ahead, ".new")
        new.write_bytes(b"".join(waiting[index] for index in sorted(waiting)))
        os.replace(new, self._files.ahead)

    def finish(self, rows: int) -> None:
        """All ``rows`` are there."""
        if self._fresh and self._writer is None:  # an input without rows
            self.begin(all_kept=True)
        self._write_kept(None)
        self._open_writer().sync()
        if self._files and self._claim:
            if self._files.work != self._files.rows:
                os.replace(self._files.work, self._files.rows)
            if not self._claim.complete:
                self._claim.finish(rows)
            for path in self._files.all_ahead:
                path.unlink(missing_ok=True)
                _beside(path, ".new").unlink(missing_ok=True)

    def __enter__(self) -> "Book":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resources.close()


def _read(path: Path) -> Iterator[Finished]:
    return read_finished(path) if path.exists() else iter(())
