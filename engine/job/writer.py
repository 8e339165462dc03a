"""Appends rows to a file or a pipe."""

import os
import stat
import time
from pathlib import Path

FLUSH_SECONDS = 0.5
FLUSH_BYTES = 1 << 20


class RowWriter:
    """Appends lines to an output, at most FLUSH_SECONDS behind, never a part of one that a later run would not repair."""

    def __init__(self, path: Path | None, size: int = 0) -> None:
        """Cuts the file at ``size``, behind its last whole line; None: standard output."""
        self._path = path
        self._fd = 1 if path is None else os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        status = os.fstat(self._fd)
        self._regular = path is not None and stat.S_ISREG(status.st_mode)
        self._inode = status.st_ino
        if self._regular and status.st_size != size:
            os.ftruncate(self._fd, size)
        self._written: tuple[int, list[bytes]] = (
            size,
            [],
        )  # one value: an interrupt sees it before or after, never between
        self._buffered = 0
        self._flushed = time.monotonic()

    def write(self, line: bytes) -> None:
        self._written[1].append(line)
        self._buffered += len(line)
        if self._buffered >= FLUSH_BYTES:
            self.flush()
        else:
            self.tick()

    def tick(self, *, idle: bool = False) -> None:
        """Flushes what has waited long enough; with ``idle`` whatever waits."""
        if self._buffered and (idle or time.monotonic() - self._flushed > FLUSH_SECONDS):
            self.flush()

    def flush(self) -> None:
        """Hands everything to the operating system. Raises OSError; the file then ends with a whole line."""
        size, lines = self._written
        data = memoryview(b"".join(lines))
        if self._regular:
            self._write_at(size, data)
        else:
            while data:
                data = data[os.write(self._fd, data) :]
        self._written = (size + len(data), [])
        self._buffered = 0
        self._flushed = time.monotonic()

    def _write_at(self, size: int, data: memoryview) -> None:
        # at a fixed place: interrupted anywhere, the same bytes are written to the same place again
        at = 0
        try:
            while at < len(data):
                at += os.pwrite(self._fd, data[at:], size + at)
        except OSError as error:
            os.ftruncate(self._fd, size)
            self._written = (size, [])
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._check_still_there()

    def _check_still_there(self) -> None:
        assert self._path is not None
        try:
            there = os.stat(self._path).st_ino == self._inode
        except OSError:
            there = False
        if not there:
            raise OSError(f"the output {self._path} was removed or replaced while it was written")

    def sync(self) -> None:
        """Flushes through to the disk."""
        self.flush()
        if self._regular:
            os.fsync(self._fd)

    def close(self) -> None:
        if self._path is not None:
            os.close(self._fd)
