"""Ends a run, or lets an operation fail, at a chosen one of its operations on files."""

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal
from unittest import mock

How = Literal["killed", "killed halfway", "error", "interrupted", "paused", "nothing"]
OPERATIONS = ("open", "pwrite", "ftruncate", "truncate", "replace", "unlink", "fsync")


class Killed(BaseException):
    """Stands for SIGKILL: from here on no operation has any effect."""


class CrashPoint:
    """Counts the operations on files while it is installed."""

    def __init__(self, at: int, how: How, more: Sequence[tuple[Any, str]] = ()) -> None:
        """``at``: number of the operation, from 1, before which it happens; in the middle of which for ``killed halfway``.
        ``more``: functions that count as operations too, as (module or class, name)."""
        self.at, self.how = at, how
        self._operations = [*((os, name) for name in OPERATIONS), *more]
        self.dead = False
        self._open: set[int] = set()
        self.done: list[str] = []
        """Names of the operations so far."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name in self._operations:
                stack.enter_context(mock.patch.object(owner, name, self._watched(name, getattr(owner, name))))
            close = os.close
            stack.enter_context(mock.patch.object(os, "close", lambda fd: (self._open.discard(fd), close(fd))))
            try:
                yield
            finally:
                for fd in self._open:  # a killed process's locks are gone
                    close(fd)

    def _watched(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return operation(*arguments, **options)
            if name == "open" and not arguments[1] & os.O_CREAT:
                return operation(*arguments, **options)
            self.done.append(name)
            if len(self.done) == self.at:
                self._strike(operation, arguments)
            if self.dead:
                raise Killed
            result = operation(*arguments, **options)
            if name == "open":
                self._open.add(result)
            return result

        return watched

    def _strike(self, operation: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if self.how == "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.how == "interrupted":
            os.kill(os.getpid(), signal.SIGINT)
        elif self.how == "paused":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.how.startswith("killed"):
            self.dead = True
            if self.how == "killed halfway":
                fd, data, place = arguments
                operation(fd, data[: max(1, len(data) // 2)], place)
