"""A value on its way from a thread to a coroutine."""

import asyncio
import threading
from typing import Generic, TypeVar

from engine.errors import EngineError

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Holds the latest value for one reader, in whichever event loop it waits; a value that was not read in time is replaced.

    Writers never wait, and have at most one callback pending in the reader's loop however slow that is.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value: T | EngineError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, value: T | EngineError) -> None:
        """Leaves a value, or an error that the reader is to raise. After the reader's loop was closed it stays unread."""
        with self._lock:
            self._value = value
            waiter, self._waiter = self._waiter, None
        if waiter is None:
            return
        try:
            waiter.get_loop().call_soon_threadsafe(_wake, waiter)
        except RuntimeError:  # the loop is closed, and with it whoever read here
            return

    def take(self) -> T | EngineError | None:
        """What lies here, if anything does."""
        with self._lock:
            value, self._value = self._value, None
            return value

    async def get(self) -> T:
        """Waits for a value; raises it if it is an error."""
        while True:
            with self._lock:
                value, self._value = self._value, None
                if value is None:
                    waiter = self._waiter = asyncio.get_running_loop().create_future()
            if value is None:
                await waiter
            elif isinstance(value, EngineError):
                raise value
            else:
                return value


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():  # the reader may have been cancelled meanwhile
        waiter.set_result(None)
