"""What an AsyncRefiner tells about itself, and the interface it tells it through."""

import logging
from typing import Protocol

logger = logging.getLogger("engine.service")

COUNTERS = {
    "requests": "Requests that ended, by reason: eos, length, steps, error, deadline, cancelled, dead, or shed: not let in",
    "tokens": "Tokens of finished answers",
    "steps": "Jacobi steps of finished answers",
    "forward_tokens": "Token positions fed through the model for finished answers, prompts included",
}
LEVELS = {
    "queued": "Requests that wait",
    "queued_tokens": "Tokens of the requests that wait: prompts and longest answers",
    "running": "Requests in the batch",
    "pages_free": "Free pages of the KV cache",
}
DURATIONS = {
    "queue_seconds": "From a request's entry to its place in the batch",
    "service_seconds": "From its place in the batch to the end of its answer",
}


class Metrics(Protocol):
    """Receives figures under the names above. Called by the engine's thread, and for shed requests by the caller's, so calls
    should be quick; an exception is logged and ends the reports, never the service."""

    def count(self, name: str, amount: int, reason: str | None = None) -> None:
        """Something happened ``amount`` times; ``reason`` comes with "requests"."""

    def level(self, name: str, value: int) -> None:
        """A level has changed to ``value``."""

    def observe(self, name: str, seconds: float) -> None:
        """A duration of one request."""


class Reporter:
    """Passes figures on, levels only when they have changed, until the receiver fails."""

    def __init__(self, metrics: Metrics | None) -> None:
        self._metrics = metrics
        self._levels: dict[str, int] = {}

    def ended(self, reason: str) -> None:
        """One request ended, or was not let in."""
        self._report("count", "requests", 1, reason)

    def answered(self, tokens: int, steps: int, forward_tokens: int) -> None:
        """The work behind one finished answer."""
        self._report("count", "tokens", tokens)
        self._report("count", "steps", steps)
        self._report("count", "forward_tokens", forward_tokens)

    def levels(self, **values: int) -> None:
        for name, value in values.items():
            if self._levels.get(name) != value:
                self._levels[name] = value
                self._report("level", name, value)

    def observe(self, name: str, seconds: float) -> None:
        self._report("observe", name, seconds)

    def _report(self, kind: str, *arguments: object) -> None:
        metrics = self._metrics
        if metrics is None:
            return
        try:
            getattr(metrics, kind)(*arguments)
        except Exception:  # somebody else's code
            self._metrics = None
            logger.exception("%s.%s%r failed: no further metrics are reported", type(metrics).__name__, kind, arguments)
