"""Ctrl-C and SIGTERM of the command, taken at a point where nothing is half done."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Interrupted(BaseException):
    """A signal asked the job to end; like KeyboardInterrupt no Exception, which anything may catch."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum


class Signals:
    """Notes SIGINT and SIGTERM inside a ``with`` block; outside the main thread it leaves them alone."""

    def __init__(self, grace: float = 0.0) -> None:
        """``grace``: seconds for which ``check`` goes on after SIGTERM."""
        self._grace = grace
        self._due: dict[int, float] = {}
        self._at_once = False
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        """Called where the job may end: raises Interrupted once a signal has come and its grace is over."""
        for signum, due in self._due.items():
            if time.monotonic() >= due:
                raise Interrupted(signum)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While nothing can be half done, a signal raises Interrupted right where it comes."""
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._note) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signum in self._due:
            raise KeyboardInterrupt  # asked twice: whatever it costs
        self._due.setdefault(signum, time.monotonic() + (self._grace if signum == signal.SIGTERM else 0.0))
        if self._at_once:
            self.check()
