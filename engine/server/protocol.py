"""HTTP/1.1 as uvicorn speaks it with h11, for clients that may be slow on purpose."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15.0
"""Time for a request's line and headers. h11 holds at most 64 KiB of them; bodies have limits of their own, in ``gate``."""


class Protocol(H11Protocol):
    """Closes a connection whose next head does not arrive in time: uvicorn waits for it for ever, once it has begun."""

    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._unwatch()
        elif self._overdue is None:  # further bytes of the same head give no further time
            self._overdue = self.loop.call_later(HEAD_SECONDS, self._close_idle)

    def _unwatch(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _close_idle(self) -> None:
        self._overdue = None
        self.timeout_keep_alive_handler()
