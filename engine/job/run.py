"""A job: finds what is left to do, runs it through a session, keeps the output in order."""

from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from engine.job.book import Book, open_book
from engine.job.output import Done, Refused, Settings, identity, read_finished
from engine.job.questions import Questions
from engine.job.reader import Reader
from engine.job.report import Reporter
from engine.job.rows import Row, parse_row
from engine.job.shards import Assembly, Shard
from engine.job.source import Source
from engine.options import RefineOptions
from engine.request import Request, Result

ROWS_AHEAD = 128
"""Rows parsed before they are needed."""
ROWS_HELD = 16
"""Finished rows kept back for the sake of their order, in batches of ``max_batch_size``."""


class StoppedAtError(ValueError):
    """An error row came up with ``on_error="stop"``; it is not in the output."""


class SessionLike(Protocol):
    """What a job needs of a ``Session``."""

    @property
    def has_room(self) -> bool: ...
    def add(self, value: Request, index: int) -> Result | None: ...
    def step(self) -> list[Result]: ...
    def close(self) -> None: ...


class RefinerLike(Protocol):
    """What a job needs of a ``Refiner``."""

    @property
    def max_batch_size(self) -> int: ...
    def session(self, options: RefineOptions) -> SessionLike: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Job:
    """What to do with which rows."""

    source: Source
    output: Path | None
    """None, for standard output, or what is no regular file: then there is nothing to resume."""
    settings: Settings
    """What decides the bytes of the output; plan.concurrency is what windows are planned for."""
    options: RefineOptions
    questions: Questions | None = None
    token_ids: bool = False
    ordered: bool = True
    on_error: Literal["row", "stop"] = "row"
    overwrite: bool = False
    """Start anew where the output is complete or of another job."""
    retry_errors: bool = False
    shard: Shard | None = None
    """This process's rows of a data-parallel job."""

    def run(self, load: Callable[[], RefinerLike], reporter: Reporter, check: Callable[[], None]) -> int | None:
        """Completes the output; the error rows in it, or None where other ranks are not done. ``load`` is called if a row
        is left to compute, ``check`` between steps: what it raises ends the job with everything finished so far in the
        output. Raises Refused, StoppedAtError, OSError.
        """
        if self.output is None or (self.output.exists() and not self.output.is_file()):
            with Book(self.settings, stream=self.output) as book:
                self._complete(book, load, reporter, check)
            return reporter.statistics.all_errors
        if self.shard is None and self.output.suffix != ".json":
            with open_book(self.output, self.settings, self.overwrite, self.retry_errors) as book:
                self._complete(book, load, reporter, check)
            return reporter.statistics.all_errors
        assembly = Assembly(self.output, self.shard or Shard())
        merges = assembly.merges(self.settings, self.overwrite)
        merged = None if merges is None else self.output
        if merged:
            done, errors = Done(identities=self.source.digest is None), 0
            for row in read_finished(merged):
                done.add(row)
                errors += row.failed
            if not (self.retry_errors and errors):
                assembly.clear(None if self.retry_errors else merges)
                if self.source.digest is None:
                    self._check_same(done, check)
                reporter.start(done.count, done.count, errors)
                return errors
        settings = {**self.settings, "plan": {**self.settings["plan"], "base": merges or 0}}
        with open_book(assembly.part, settings, self.overwrite, self.retry_errors, merged, assembly.shard) as book:
            self._complete(book, load, reporter, check)
        return assembly.merge(self.settings, reporter.say)

    def _complete(
        self, book: Book, load: Callable[[], RefinerLike], reporter: Reporter, check: Callable[[], None]
    ) -> None:
        unread = _Unread(self, book.done)
        with closing(Reader(iter(unread), ROWS_AHEAD)) as reader:
            reporter.start(self._total(), book.done.count, book.errors)
            first = None
            while first is None and not reader.ended:
                check()
                first = reader.get(wait=True)
            if first is not None:
                options = replace(self.options, concurrency=book.concurrency)
                with closing(load()) as refiner, closing(refiner.session(options)) as session:
                    book.begin(all_kept=not self.ordered)
                    reporter.begin()
                    _Loop(self, book, reader, reporter, check, session, refiner.max_batch_size).run(first)
        book.finish(unread.rows)

    def _check_same(self, done: Done, check: Callable[[], None]) -> None:
        """Reads the input through. Raises Refused unless it is that of the complete output."""
        with closing(Reader(iter(_Unread(self, done)), ROWS_AHEAD)) as reader:
            while not reader.ended:
                check()
                row = reader.get(wait=True)
                if row:
                    raise Refused(f"{self.source.path} has more rows than {self.output}: the input is not the same")

    def _total(self) -> int | None:
        rows = self.source.rows
        if rows is None or self.shard is None:
            return rows
        return len(range(self.shard.rank, rows, self.shard.world))


class _Unread:
    """The rows that are not finished; iterated in the reader's thread."""

    def __init__(self, job: Job, done: Done) -> None:
        self.rows = 0
        """Rows of this shard seen so far, finished ones included."""
        self._job, self._done = job, done

    def __iter__(self) -> Iterator[Row]:
        job = self._job
        for index, raw in enumerate(job.source.read()):
            if job.shard is not None and index not in job.shard:
                continue
            self.rows += 1
            finished = index in self._done
            if finished and job.source.digest is not None:
                continue  # the whole input is known to be the same
            row = parse_row(raw, index, job.questions)
            if not finished:
                yield row
            elif self._done.identity(index) not in (0, identity(row.taken_over())):
                raise Refused(
                    f"row {index} of {job.source.path} is not the row that {job.output} has in its place: "
                    "give the same input again, another --output, or --overwrite to start anew"
                )
        if self._done.count > self.rows or (job.shard is None and self._done.last >= self.rows):
            raise Refused(f"{job.output} has more rows than {job.source.path}: the input is not the same")


class _Loop:
    """Rows on their way through a session."""

    def __init__(
        self,
        job: Job,
        book: Book,
        reader: Reader,
        reporter: Reporter,
        check: Callable[[], None],
        session: SessionLike,
        max_batch_size: int,
    ) -> None:
        self.job, self.book, self.reader, self.reporter = job, book, reader, reporter
        self.check, self.session = check, session
        self.most_held = ROWS_HELD * max_batch_size
        self.active: dict[int, Row] = {}  # by their place among the rows of this run
        self.held: dict[int, tuple[Row, bytes]] = {}  # finished before an earlier one
        self.started = self.due = 0
        self.failure: Exception | None = None

    def run(self, first: Row) -> None:
        try:
            self._start(first)
            while self.active or not self.reader.ended:
                self.check()
                self._fill()
                if self.active:
                    for result in self.session.step():
                        self._advance(result)
                self.book.tick(idle=not self.active)
                self.reporter.tick(len(self.active), len(self.held))
        except BaseException:
            self._keep_finished()
            raise
        self.book.flush()
        if self.failure:
            raise self.failure

    def _keep_finished(self) -> None:
        """What can still be brought to disk when the job ends early."""
        with suppress(OSError):  # the first error is the one to tell
            self.book.flush()
            ahead = {row.index: line for row, line in self.held.values() if not row.error}
            if ahead and self.job.output is not None:
                self.book.set_aside(ahead)
                self.reporter.statistics.ahead = len(ahead)

    def _fill(self) -> None:
        # one long answer must not let the input pile up behind it
        while self.session.has_room and len(self.held) < self.most_held:
            try:
                row = self.reader.get(wait=not self.active)
            except Exception as error:  # rows read before it are finished first
                self.failure = error
                return
            if row is None:
                return
            self._start(row)

    def _start(self, row: Row) -> None:
        place = self.started
        self.started += 1
        if row.finished:  # cannot be refined
            self._finish(row, place)
        else:
            self.active[place] = row
            self._ask(row, place)

    def _ask(self, row: Row, place: int) -> None:
        failed = self.session.add(row.request(), place)
        if failed:
            self._advance(failed)

    def _advance(self, result: Result) -> None:
        row = self.active[result.index]
        row.take(result)
        if row.finished:
            del self.active[result.index]
            self._finish(row, result.index)
        else:
            self._ask(row, result.index)

    def _finish(self, row: Row, place: int) -> None:
        line = row.line(self.job.token_ids)
        if not self.job.ordered:
            self._write(row, line)
            return
        self.held[place] = row, line
        while self.due in self.held:
            self._write(*self.held.pop(self.due))
            self.due += 1

    def _write(self, row: Row, line: bytes) -> None:
        if row.error and self.job.on_error == "stop":
            raise StoppedAtError(f"row {row.index} (id {row.id!r}): {type(row.error).__name__}: {row.error}")
        self.book.write(row.index, line)
        self.reporter.add(row)
