"""Rows of an input file, read as a stream: JSON lines (also gzipped), a JSON array, Parquet."""

import codecs
import errno
import gzip
import hashlib
import io
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from typing import Any, Literal

from engine.errors import InvalidRequest

MAX_ROW_BYTES = 16 << 20
"""Longest line, or element of an array, that is read into memory."""
MAX_DEPTH = 256
"""Deepest nesting of a row: what is written must be read again from wherever, so the interpreter's own limit is too late."""
BLOCK = 1 << 20
PARQUET_ROWS = 256

Fields = dict[str, Any]
RawRow = Callable[[], Fields]
"""Parses a row when called, so that rows of other shards and rows already finished cost next to nothing; raises
InvalidRequest where there is no row in that place."""
Form = Literal["lines", "array", "parquet"]


@dataclass(frozen=True, slots=True)
class Source:
    """An input file and what identifies its content."""

    path: str
    """"-": standard input."""
    form: Form
    gzipped: bool
    digest: str | None
    """Of the content; None for a pipe, which can be read only once."""
    rows: int | None
    """About how many rows there are (blank lines count), where that is known beforehand."""
    stamp: tuple[int, int] | None = None
    """Size and time of modification when the digest was taken."""

    @classmethod
    def open(cls, path: str) -> "Source":
        """Looks at a file: its form by its name, its digest and number of rows by reading it. Raises OSError, ValueError."""
        name = path.lower()
        gzipped = name.endswith(".gz")
        name = name.removesuffix(".gz")
        form: Form = "parquet" if name.endswith(".parquet") else "array" if name.endswith(".json") else "lines"
        if form == "parquet" and gzipped:
            raise ValueError(f"{path} is a gzipped Parquet file: unpack it, Parquet is compressed by itself")
        mode = os.fstat(0).st_mode if path == "-" else os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if path == "-" or not stat.S_ISREG(mode):
            if form != "lines" or gzipped:
                raise ValueError(f"{path} is not a regular file: only JSON lines are read from a pipe")
            return cls(path, form, gzipped, None, None)
        stamp = _stamp(path)
        digest, lines = _digest(path)
        rows = lines if form == "lines" and not gzipped else None
        if form == "parquet":
            rows = _parquet_file(path).metadata.num_rows
        return cls(path, form, gzipped, digest, rows, stamp)

    def read(self) -> Iterator[RawRow]:
        """The rows in order. Raises OSError when reading fails on the way, or the file was changed meanwhile."""
        yield from self._read()
        if self.stamp is None or not os.path.exists(self.path) or _stamp(self.path) == self.stamp:
            return
        if _digest(self.path)[0] != self.digest:  # not only touched
            raise OSError(f"{self.path} was changed while it was read: start anew with --overwrite")

    def _read(self) -> Iterator[RawRow]:
        if self.form == "parquet":
            yield from _read_parquet(self.path)
            return
        try:
            with open(0 if self.path == "-" else self.path, "rb", BLOCK, closefd=self.path != "-") as raw:
                file: io.BufferedIOBase = gzip.GzipFile(fileobj=raw) if self.gzipped else raw  # type: ignore[assignment]
                yield from _read_array(file) if self.form == "array" else _read_lines(file)
        except (EOFError, zlib.error) as error:
            raise OSError(f"{self.path} is not a whole gzip file: {error}") from error


def open_regular(path: str) -> Source:
    """A file that can be read again, when a run is resumed. Raises OSError, ValueError."""
    source = Source.open(path)
    if source.digest is None:
        raise ValueError(f"{path} must be a regular file: it is read again when a run is resumed")
    return source


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _digest(path: str) -> tuple[str, int]:
    """Hash and number of lines of a file."""
    digest, lines, last = hashlib.blake2b(digest_size=16), 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            lines += block.count(b"\n")
            last = block[-1:]
    return digest.hexdigest(), lines + (last != b"\n")


def _read_lines(file: io.BufferedIOBase) -> Iterator[RawRow]:
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        too_long = len(line) > MAX_ROW_BYTES and not line.endswith(b"\n")
        while too_long and not line.endswith(b"\n") and (line := file.readline(BLOCK)):
            pass  # its rest
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if too_long:
            yield _raiser(f"line {number} is longer than {MAX_ROW_BYTES} bytes")
        elif not line.isspace() and line:
            yield _Line(line, f"line {number}")


@dataclass(frozen=True, slots=True)
class _Line:
    """A row of JSON text."""

    text: bytes
    place: str

    def __call__(self) -> Fields:
        try:
            row = _DECODER.decode(self.text.rstrip().decode())
        except RecursionError:
            raise InvalidRequest(f"{self.place} is nested deeper than {MAX_DEPTH} levels") from None
        except ValueError as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise InvalidRequest(f"{self.place} is not valid JSON: {reason}") from None
        if not isinstance(row, dict):
            raise InvalidRequest(f"{self.place} must hold a JSON object, got {type(row).__name__}")
        if self.text.count(b"[") + self.text.count(b"{") > MAX_DEPTH and _is_deep(row):
            raise InvalidRequest(f"{self.place} is nested deeper than {MAX_DEPTH} levels")
        return row


def _is_deep(row: Fields) -> bool:
    level: list[Any] = [row]
    for _ in range(MAX_DEPTH):
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [item for items in inner for item in items]
        if not level:
            return False
    return any(isinstance(v, dict | list) for v in level)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # NaN, Infinity or 1e999: could not be written as JSON again
        raise ValueError(f"{text:.40} is not a finite number")
    return value


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


def _raiser(message: str) -> RawRow:
    def raise_it() -> Fields:
        raise InvalidRequest(message)

    return raise_it


def _read_array(file: io.BufferedIOBase) -> Iterator[RawRow]:
    """The elements of a JSON array, cut apart by their quotes and brackets: a broken one costs only itself as long as these
    come in pairs."""
    # read1: where a gzip file breaks off, read would lose what comes before
    block = file.read1(BLOCK)
    while len(block) < len(codecs.BOM_UTF8) and (piece := file.read1(BLOCK)):
        block += piece
    block = block.removeprefix(codecs.BOM_UTF8)
    while not block.strip() and (block := file.read1(BLOCK)):
        pass
    block = block.lstrip()
    if block[:1] != b"[":  # JSON lines under another name
        yield from _read_lines(io.BufferedReader(_Joined(block, file)))
        return
    number, cut = 0, _ArrayCutter()
    block = block[1:]
    while not cut.closed and (block := block or file.read1(BLOCK)):
        for element in cut.feed(block):
            yield _element(element, number)
            number += 1
        block = b""
    rest = cut.rest()
    if rest.strip():
        yield _element(rest, number) if cut.closed else _raiser(f"element {number} is cut off: the array has no end")
    elif not cut.closed:
        yield _raiser(f"the array has no end: the file breaks off behind element {number - 1}")
    behind = cut.behind
    while cut.closed and not behind.strip() and (behind := file.read1(BLOCK)):
        pass
    if behind.strip():
        yield _raiser(f"the array ends, and more text follows it: {behind.strip()[:40]!r}")


def _element(text: bytes, number: int) -> RawRow:
    if len(text) > MAX_ROW_BYTES:
        return _raiser(f"element {number} is longer than {MAX_ROW_BYTES} bytes")
    return _Line(text.strip(), f"element {number}")


class _ArrayCutter:
    """Finds the commas between the elements of an array that comes in pieces."""

    _outside = re.compile(rb'[{}\[\]",]')
    _inside = re.compile(rb'["\\]')

    def __init__(self) -> None:
        self.closed = False
        self.behind = b""
        """What follows the end of the array in the last piece."""
        self._kept: list[bytes] = []  # of the element under way, at most a little more than MAX_ROW_BYTES
        self._size = 0
        self._depth = 0
        self._in_string = False
        self._skip = 0  # bytes that follow a backslash

    def feed(self, block: bytes) -> Iterator[bytes]:
        """The elements that end in this piece."""
        start, at = 0, self._skip
        self._skip = 0
        while found := (self._inside if self._in_string else self._outside).search(block, at):
            at, byte = found.end(), found.group()
            if byte == b'"':
                self._in_string = not self._in_string
            elif byte == b"\\":
                at += 1
                self._skip = max(0, at - len(block))
            elif byte in b"{[":
                self._depth += 1
            elif byte in b"}]":
                self._depth -= 1
                if self._depth < 0:
                    self.closed = True
                    self._keep(block[start : at - 1])
                    self.behind = block[at:]
                    return
            elif self._depth == 0:
                self._keep(block[start : at - 1])
                yield self._take()
                start = at
        self._keep(block[start:])

    def rest(self) -> bytes:
        """What stands behind the last comma."""
        return self._take()

    def _keep(self, piece: bytes) -> None:
        if self._size <= MAX_ROW_BYTES:
            self._kept.append(piece)
            self._size += len(piece)

    def _take(self) -> bytes:
        text = b"".join(self._kept)
        self._kept, self._size = [], 0
        return text


class _Joined(io.RawIOBase):
    """A file with the bytes already read put back in front."""

    def __init__(self, head: bytes, rest: io.BufferedIOBase) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._head[: len(buffer)] or self._rest.read1(len(buffer))
        self._head = self._head[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)


def _parquet_file(path: str) -> Any:
    try:
        from pyarrow import lib, parquet
    except ImportError:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install 'diffpo-engine[parquet]'") from None
    try:
        return parquet.ParquetFile(path)
    except lib.ArrowException as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error


def _read_parquet(path: str) -> Iterator[RawRow]:
    number = 0
    with _parquet_file(path) as file:
        try:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for i in range(batch.num_rows):
                    yield _ParquetRow(batch, i, number)
                    number += 1
        except Exception as error:  # pyarrow's errors have no common ancestor but this one
            raise OSError(f"{path} cannot be read behind row {number}: {error}") from error


@dataclass(frozen=True, slots=True)
class _ParquetRow:
    batch: Any
    offset: int
    number: int

    def __call__(self) -> Fields:
        try:
            row = self.batch.slice(self.offset, 1).to_pylist()[0]
        except Exception as error:  # a timestamp no datetime can hold, text that is no UTF-8
            raise InvalidRequest(f"row {self.number} cannot be read: {error}") from error
        return {name: _as_json(value, name) for name, value in row.items()}


def _as_json(value: Any, name: str) -> Any:
    """A cell in the types that JSON has. NaN, which stands for a missing value there, becomes None."""
    if isinstance(value, dict):
        return {str(key): _as_json(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item, name) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise InvalidRequest(f"column {name!r} holds {type(value).__name__}, which JSON cannot: convert or drop it")


def kind_of(value: object) -> str:
    """What a value is, for messages."""
    if value is None:
        return "nothing"
    return f"{type(value).__name__}" + (" without elements" if value in ([], {}) else "")
