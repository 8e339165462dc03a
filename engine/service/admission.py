"""Who may enter: a queue bounded in requests and in tokens."""

import threading
from collections import deque
from collections.abc import Callable

from engine.errors import EngineDead, QueueFull

REMEMBERED = 64
"""Departures from the queue that tell how fast it moves."""
SHORTEST_RETRY, LONGEST_RETRY = 0.05, 60.0
"""Seconds between which every retry hint lies."""


class Admission:
    """Counts those who wait. May be called by any number of threads; holds its lock for a few additions at most."""

    def __init__(self, max_requests: int, max_tokens: int, clock: Callable[[], float]) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.requests = 0
        self.tokens = 0
        self._clock = clock
        self._lock = threading.Lock()
        self._closed: str | None = None
        self._departures: deque[tuple[float, int]] = deque(maxlen=REMEMBERED)

    @property
    def closed(self) -> bool:
        return self._closed is not None

    @property
    def retry_after(self) -> float:
        """Seconds in which those who wait now will all be served, as fast as the last ones were."""
        with self._lock:
            return self._retry_after()

    def check(self, tokens: int = 1) -> None:
        """Raises QueueFull where a request of so many tokens would not be let in, EngineDead after ``close``."""
        with self._lock:
            self._check(tokens)

    def enter(self, tokens: int, deliver: Callable[[], None]) -> None:
        """Counts a request in and delivers it, or raises as ``check`` does (or as ``deliver``) and does neither."""
        with self._lock:
            self._check(tokens)
            deliver()
            self.requests += 1
            self.tokens += tokens

    def leave(self, tokens: int, *, served: bool) -> None:
        """Counts a request out; ``served``: it is being worked on now, otherwise it was given up."""
        with self._lock:
            self.requests -= 1
            self.tokens -= tokens
            if served:
                self._departures.append((self._clock(), tokens))

    def close(self, reason: str) -> None:
        """Lets nobody in from now on, for the reason first given."""
        with self._lock:
            self._closed = self._closed or reason

    def _check(self, tokens: int) -> None:
        if self._closed:
            raise EngineDead(self._closed)
        # what fits the cache must be able to enter sometime: an empty queue takes it whatever the limit
        if self.requests and (self.requests >= self.max_requests or self.tokens + tokens > self.max_tokens):
            retry_after = self._retry_after()
            raise QueueFull(
                f"{self.requests} requests of {self.tokens} tokens wait, and {tokens} more would exceed"
                f" {self.max_requests} requests or {self.max_tokens} tokens: try again in {retry_after:.2f} s",
                retry_after,
            )

    def _retry_after(self) -> float:
        if not self._departures:
            return 1.0
        passed = self._clock() - self._departures[0][0]
        served = sum(tokens for _, tokens in self._departures)
        return min(max(self.tokens * passed / served, SHORTEST_RETRY), LONGEST_RETRY)
