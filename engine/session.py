"""Requests on their way through a refiner: added one by one, moved step by step, collected as they finish."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidRequest
from engine.jacobi import JacobiSequence
from engine.options import RefineOptions
from engine.request import Request, Result

if TYPE_CHECKING:
    from engine.refiner import Refiner

RequestLike = Request | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Open:
    index: int
    request: Request
    sequence: JacobiSequence
    started: float


class Session:
    """What ``Refiner.stream`` is made of, for callers whose requests come over time: ``add`` while ``has_room``, ``step``
    while ``open``. Several sessions of a refiner share its batch; one session belongs to one thread at a time.
    """

    def __init__(self, refiner: "Refiner", options: RefineOptions | None = None) -> None:
        self._refiner = refiner
        self._options = options or RefineOptions()
        self._open: list[_Open] = []

    @property
    def open(self) -> int:
        """Requests added and not finished."""
        return len(self._open)

    @property
    def has_room(self) -> bool:
        """Whether another request would find a place in the batch. Raises EngineDead on a closed refiner."""
        scheduler = self._refiner._alive()
        return scheduler.load < scheduler.max_batch_size

    def add(self, value: RequestLike, index: int) -> Result | None:
        """Queues a request; its result will carry ``index``. A bad one is not queued: the result with its error comes back
        at once."""
        identity, metadata = _identity(value, index)
        started = time.monotonic()
        with self._refiner._lock:  # the tokenizer is shared too
            try:
                request = Request.parse(value)
                sequence = self._refiner._sequence(request, self._options)
            except InvalidRequest as error:
                return Result(id=identity, index=index, error=error, metadata=metadata)
            self._refiner._alive().add(sequence)
            self._open.append(_Open(index, request, sequence, started))
        return None

    def step(self) -> list[Result]:
        """Moves everything that runs by one step; what ended of this session's own."""
        with self._refiner._lock:
            self._refiner._drop_abandoned()
            # a step of another session may have ended all of ours already; while others hold every place we move theirs on
            if not any(entry.sequence.finish_reason for entry in self._open):
                self._refiner._alive().step()
            done = [entry for entry in self._open if entry.sequence.finish_reason]
            self._open = [entry for entry in self._open if not entry.sequence.finish_reason]
            return [self._result(entry) for entry in done]

    def close(self) -> None:
        """Gives back what unfinished requests hold; after a normal end there are none."""
        refiner = self._refiner
        refiner._abandoned.extend(entry.sequence for entry in self._open)
        self._open.clear()
        # Never waits: the garbage collector may end a stream anywhere, also in a thread that holds the lock. Then the
        # pages come back when the lock is next taken.
        if refiner._abandoned and refiner._lock.acquire(blocking=False):
            try:
                refiner._drop_abandoned()
            finally:
                refiner._lock.release()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _result(self, entry: _Open) -> Result:
        request, sequence = entry.request, entry.sequence
        reason, failed = sequence.finish_reason, sequence.error
        assert reason is not None
        return Result(
            id=entry.index if request.id is None else request.id,
            index=entry.index,
            text=None if failed else self._refiner._codec.decode(sequence.final),
            token_ids=[] if failed else sequence.final,
            steps=sequence.steps,
            converged=sequence.converged and not failed,
            forward_tokens=sequence.forward_tokens,
            finish_reason=reason,
            seconds=time.monotonic() - entry.started,
            error=failed,
            metadata=request.metadata,
        )


def _identity(value: object, index: int) -> tuple[str | int, dict[str, Any]]:
    """The id and metadata of a request that may not even be one."""
    get = value.get if isinstance(value, Mapping) else lambda name: getattr(value, name, None)
    identity, metadata = get("id"), get("metadata")
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        identity = index
    return identity, metadata if isinstance(metadata, dict) else {}
