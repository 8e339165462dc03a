"""Messages to the engine's thread."""

import queue
import threading
from collections.abc import Callable
from typing import Any

from engine.errors import EngineDead
from engine.service.mailbox import Mailbox

Action = Callable[[], None]


class Inbox:
    """Actions for the thread that owns the engine, each with the mailbox of whoever waits for what comes of it."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Action, Mailbox[Any] | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._sealed: str | None = None

    def post(self, action: Action, mailbox: Mailbox[Any]) -> None:
        """Raises EngineDead once the inbox is sealed: what was posted before then is done, or its mailbox told why not."""
        with self._lock:
            if self._sealed is not None:
                raise EngineDead(self._sealed)
            self._queue.put((action, mailbox))

    def whisper(self, action: Action) -> None:
        """Posts without a lock: the garbage collector may call this anywhere, also in a thread that is just posting."""
        self._queue.put((action, None))

    def __len__(self) -> int:
        return self._queue.qsize()

    def get(self, timeout: float | None) -> Action | None:
        """The next action; waits for it up to ``timeout`` seconds, None: as long as it takes."""
        try:
            return self._queue.get(timeout=timeout)[0]
        except queue.Empty:
            return None

    def seal(self, reason: str) -> list[Mailbox[Any]]:
        """Ends posting; the mailboxes of those whose actions were not fetched any more."""
        with self._lock:
            self._sealed = reason
        left = []
        while len(self):
            mailbox = self._queue.get()[1]
            if mailbox is not None:
                left.append(mailbox)
        return left
