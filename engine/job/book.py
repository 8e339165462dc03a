"""The file of finished rows that a job is completing."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from engine.job.output import Claim, Done, Finished, Refused, Settings, difference, read_finished
from engine.job.shards import Shard
from engine.job.writer import RowWriter

RETRY_SUFFIX = ".retry"


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
    the file belongs to another job or process.
    """
    with ExitStack() as stack:
        claim = stack.enter_context(Claim(rows))
        retry = rows.with_name(rows.name + RETRY_SUFFIX)
        _agree(claim, rows, retry, settings, overwrite, retry_errors)
        old, work = merged, rows
        if retry_errors and not merged and (retry.exists() or _has_errors(rows)):
            old, work = rows, retry
        assert claim.settings is not None
        book = Book(work, claim.settings, rows, claim, old, shard)
        book.resources.push(stack.pop_all())
        return book


def _agree(claim: Claim, rows: Path, retry: Path, settings: Settings, overwrite: bool, retry_errors: bool) -> None:
    """Makes sure that what is in the file belongs to this job, or clears it away."""
    written = any(path.exists() and path.stat().st_size for path in (rows, retry))
    changed = difference(claim.settings, settings) if written else None
    if changed and not overwrite:
        raise Refused(
            f"{rows} holds rows of another run ({changed}): "
            "give the same model, input and options, another --output, or --overwrite to start anew"
        )
    if not written or changed or (overwrite and claim.complete):
        for path in (rows, retry):
            if path.exists():
                os.truncate(path, 0)
        retry.unlink(missing_ok=True)
        claim.begin(settings)
    elif retry.exists() and not retry_errors:
        raise Refused(f"{retry} is of a run with --retry-errors that was cut short: finish it with --retry-errors")


def _has_errors(rows: Path) -> bool:
    return rows.exists() and any(row.failed for row in read_finished(rows))


class Book:
    """Rows finished before and rows to be added; in a ``with`` block, which gives up the file at its end."""

    def __init__(
        self,
        work: Path | None,
        settings: Settings,
        rows: Path | None = None,
        claim: Claim | None = None,
        old: Path | None = None,
        shard: Shard | None = None,
    ) -> None:
        """Rows go to ``work``, which replaces ``rows`` in the end; those of ``old`` without an error are kept."""
        self.resources = ExitStack()
        self.done = Done()
        """Rows that need not be computed."""
        self.errors = 0
        """Error rows among them."""
        self.concurrency: int = settings["plan"]["concurrency"]
        self._work, self._rows, self._claim = work, rows, claim
        self._new = work is not None and not work.exists()
        there, size = Done(), 0
        for row in read_finished(work) if work and work.exists() else ():
            there.add(row)
            self.done.add(row)
            self.errors += row.failed
            size = row.end
        for row in _kept(old, shard, there):
            self.done.add(row)
        self._kept = _kept(old, shard, there)
        self._next_kept = next(self._kept, None)
        self._writer = RowWriter(work, size)
        self.resources.callback(self._writer.close)

    def begin(self, *, all_kept: bool) -> None:
        """Before the first row is written; ``all_kept``: their order among the new ones does not matter."""
        if self._claim:
            self._claim.reopen()
        if all_kept:
            self._write_kept(None)

    def write(self, index: int, line: bytes) -> None:
        self._write_kept(index)
        self._writer.write(line)

    def tick(self, *, idle: bool) -> None:
        """Flushes what has waited long enough, or everything if nothing else is going on."""
        self._writer.tick(idle=idle)

    def flush(self) -> None:
        self._writer.flush()

    def finish(self, rows: int) -> None:
        """All ``rows`` are there."""
        self._write_kept(None)
        self._writer.sync()
        if self._claim and self._work and self._rows:
            if self._work != self._rows:
                os.replace(self._work, self._rows)
            if not self._claim.complete:
                self._claim.finish(rows)

    def _write_kept(self, before: int | None) -> None:
        while self._next_kept and (before is None or self._next_kept.index < before):
            self._writer.write(self._next_kept.line)
            self._next_kept = next(self._kept, None)

    def __enter__(self) -> "Book":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error and self._work and self._writer.size == 0 and self._claim and self._work == self._rows:
            self._claim.remove()  # nothing came of it: leave no trace
            if self._new:
                self._work.unlink(missing_ok=True)
        self.resources.close()


def _kept(old: Path | None, shard: Shard | None, there: Done) -> Iterator[Finished]:
    """The good rows of an earlier output that are not in the new one yet."""
    for row in read_finished(old) if old and old.exists() else ():
        if not row.failed and row.index not in there and (shard is None or row.index in shard):
            yield row
