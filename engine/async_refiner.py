"""The refiner for programs that serve: requests from any event loop and thread, answered as they come.

An AsyncRefiner has one thread of its own, which alone moves the batch. A request is encoded and let in, or refused, before
its caller first waits; from then on the two sides share a mailbox.
"""

import asyncio
import atexit
import itertools
import math
import os
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from engine.errors import EngineDead, EngineError, QueueFull, UnsupportedModel
from engine.model import Decoder
from engine.options import RefineOptions
from engine.refiner import Refiner
from engine.request import Request, Result
from engine.service.admission import Admission
from engine.service.mailbox import Mailbox
from engine.service.metrics import Metrics, Reporter
from engine.service.ticket import Finished, Iterate, Ticket
from engine.service.worker import CLOSED, Worker
from engine.session import RequestLike

SECONDS_AT_EXIT = 30.0
"""Longest wait at the interpreter's end for an engine that was not closed to finish the step it is in."""


class AsyncRefiner:
    """Refines requests that come one by one. Its methods may be called from any number of event loops and threads.

    Use it in an ``async with`` block, or close it: that ends its thread and frees weights and cache. A process forked from
    this one cannot use it. Every call either returns or raises an EngineError: EngineDead if the engine fails or is closed.
    """

    def __init__(
        self,
        refiner: Refiner,
        *,
        max_queue_requests: int = 1024,
        max_queue_tokens: int = 262_144,
        metrics: Metrics | None = None,
    ) -> None:
        """Takes ``refiner`` over and closes it in the end. ``max_queue_requests`` and ``max_queue_tokens`` (prompts and longest
        answers) bound those who wait for a place in the batch."""
        for name, value in (("max_queue_requests", max_queue_requests), ("max_queue_tokens", max_queue_tokens)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        self._process = os.getpid()
        self._refiner = refiner
        self._decoder = refiner._codec.copy()  # event loops decode: they must not wait while another thread encodes
        self._clock = time.monotonic
        self._numbers = itertools.count()
        self._reporter = Reporter(metrics)
        self._admission = Admission(max_queue_requests, max_queue_tokens, self._clock)
        self._worker = Worker(refiner, self._admission, self._reporter, self._clock)
        # daemon: if nobody closes it, it must not keep the interpreter from ending
        self._thread = threading.Thread(target=self._worker.run, name="engine", daemon=True)
        self._thread.start()
        self._finalizer = weakref.finalize(self, _abandon, self._worker, self._process)
        self._finalizer.atexit = False
        self._at_exit = partial(_end_at_exit, weakref.ref(self._worker), self._thread, self._process)
        atexit.register(self._at_exit)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path | None = None,
        *,
        max_queue_requests: int = 1024,
        max_queue_tokens: int = 262_144,
        metrics: Metrics | None = None,
        **loading: Any,
    ) -> "AsyncRefiner":
        """Loads a checkpoint as ``Refiner.from_pretrained`` does, with its keywords; that blocks."""
        refiner = Refiner.from_pretrained(path_or_hub_id, **loading)
        return cls(refiner, max_queue_requests=max_queue_requests, max_queue_tokens=max_queue_tokens, metrics=metrics)

    async def refine(
        self,
        request: RequestLike,
        options: RefineOptions | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Result:
        """The answer, or an error raised: InvalidRequest and QueueFull before anything is waited for, others as they happen.

        Requests of a higher ``priority`` enter the batch first, equal ones in turn; whoever is in stays in. ``deadline``:
        seconds from now, then DeadlineExceeded. Cancelling the call frees what it holds before the next step.
        """
        ticket = self._submit(request, options, priority, deadline, streamed=False)
        try:
            news = await ticket.mailbox.get()
        finally:
            self._leave(ticket)
        assert isinstance(news, Finished)
        return ticket.result(news, self._decoder)

    async def stream(
        self,
        request: RequestLike,
        options: RefineOptions | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> AsyncGenerator[Iterate, None]:
        """Yields iterates of the answer, the last one with the result; otherwise as ``refine``.

        The engine does not wait for the reader: one who takes longer than a step finds the latest iterate, not all of them.
        Leaving the loop early cancels the request (``contextlib.aclosing`` does it at once, for certain).
        """
        ticket = self._submit(request, options, priority, deadline, streamed=True)
        try:
            while True:
                news = await ticket.mailbox.get()
                yield ticket.iterate(news, self._decoder)
                if isinstance(news, Finished):
                    return
        finally:
            self._leave(ticket)

    def encode(self, request: RequestLike, options: RefineOptions | None = None) -> tuple[list[int], list[int]]:
        """Prompt ids and draft ids as ``refine`` would feed them, for callers that count tokens or send a draft in parts.

        A request of these ids, under the same options without ``condition``, has the same answer. Computes in the caller's
        thread; raises InvalidRequest and RequestTooLong as ``refine`` does.
        """
        self._check_process()
        return self._refiner._encode(Request.parse(request), options or RefineOptions())

    @property
    def alive(self) -> bool:
        """Whether it takes requests: neither closed, nor closing, nor failed, nor in a forked process."""
        return os.getpid() == self._process and not self._admission.closed

    @property
    def retry_after(self) -> float:
        """Seconds in which those who wait now will all be in the batch, as fast as lately: QueueFull's hint, for callers that
        turn requests away themselves. May be read anywhere."""
        self._check_process()
        return self._admission.retry_after

    async def pause(self, *, finish: bool = False) -> None:
        """Returns when the engine stands still, between two steps; with ``finish`` when what is in the batch is done.

        Requests are still let in to the queue, cancelled, and ended by their deadlines. A cancelled call pauses nothing,
        and leaves an engine that others have paused as it is. Raises EngineError if another call resumes it, or stops it at
        once, before the batch was done.
        """
        self._check_process()
        mailbox: Mailbox[bool] = Mailbox()
        self._worker.inbox.post(partial(self._worker.pause, mailbox, finish=finish), mailbox)
        try:
            await mailbox.get()
        except asyncio.CancelledError:
            self._worker.inbox.whisper(partial(self._worker.withdraw, mailbox))
            raise

    def resume(self) -> None:
        """Goes on, however often ``pause`` was called."""
        self._check_process()
        self._worker.inbox.post(self._worker.resume, Mailbox())

    async def update_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces the weights, in place and between two steps, by those of a ``state_dict()`` of the same configuration.

        They are copied and packed in another thread first, so memory holds them twice for a while, and must not change before
        this returns. Raises UnsupportedModel, and leaves the old weights, if they do not fit. Every answer comes from one
        set of weights: what is in the batch begins anew (after ``pause(finish=True)`` nothing is); nothing is lost.
        """
        self._check_process()
        model = self._refiner._alive().model
        if not isinstance(model, Decoder):
            raise UnsupportedModel(f'update_weights needs backend="lean", got {type(model).__name__}')
        weights = await asyncio.to_thread(model.with_tensors, tensors)
        await self._ask(lambda mailbox: partial(self._worker.update, weights, mailbox))

    async def close(self, *, drain: bool = True) -> None:
        """Lets nobody in any more, finishes what was let in (without ``drain``: ends it with EngineDead) and frees everything.

        May be called again, also to cut a drain short. In a forked process it does nothing.
        """
        if os.getpid() != self._process:
            return
        self._admission.close(CLOSED)
        with suppress(EngineDead):  # that it has ended already
            await self._ask(lambda mailbox: partial(self._worker.close, mailbox, drain=drain))
        self._thread.join()  # at its last statement
        self._finalizer.detach()
        atexit.unregister(self._at_exit)

    async def __aenter__(self) -> "AsyncRefiner":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.close(drain=kind is None)
        except asyncio.CancelledError:
            await self.close(drain=False)
            raise

    def _submit(
        self,
        value: RequestLike,
        options: RefineOptions | None,
        priority: int,
        deadline: float | None,
        *,
        streamed: bool,
    ) -> Ticket:
        """Everything up to the first wait: nothing that a cancellation could leave half done."""
        self._check_process()
        _check_urgency(priority, deadline)
        options = options or RefineOptions()
        entered = self._clock()
        try:
            self._admission.check()  # so that a request that is shed is not encoded first
            request = Request.parse(value)
            ticket = Ticket(
                request=request, options=options, number=next(self._numbers), priority=priority, entered=entered,
                deadline=None if deadline is None else entered + deadline, streamed=streamed,
                sequence=self._refiner._sequence(request, options),
            )  # fmt: skip
            enter = partial(self._worker.enter, ticket)
            self._admission.enter(ticket.tokens, partial(self._worker.inbox.post, enter, ticket.mailbox))
        except EngineError as error:
            self._reporter.ended(
                "shed" if isinstance(error, QueueFull) else "dead" if isinstance(error, EngineDead) else "error"
            )
            raise
        return ticket

    def _leave(self, ticket: Ticket) -> None:
        # called by the garbage collector too, anywhere, if a generator is dropped: takes no lock
        if not ticket.ended:
            self._worker.inbox.whisper(partial(self._worker.leave, ticket))

    async def _ask(self, action: Callable[[Mailbox[bool]], Callable[[], None]]) -> None:
        """Has the engine's thread do something, and waits until it has."""
        self._check_process()
        mailbox: Mailbox[bool] = Mailbox()
        self._worker.inbox.post(action(mailbox), mailbox)
        await mailbox.get()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise EngineDead(
                f"this AsyncRefiner belongs to process {self._process}, and its thread does not exist in the forked process"
                f" {os.getpid()}: load one after the fork"
            )


def _abandon(worker: Worker, process: int) -> None:
    """An AsyncRefiner that nobody closed is gone: its thread ends by itself. Nothing is waited for."""
    if os.getpid() == process:
        worker.inbox.whisper(partial(worker.close, None, drain=False))


def _end_at_exit(worker: "weakref.ref[Worker]", thread: threading.Thread, process: int) -> None:
    """The interpreter ends with an engine that nobody closed: a thread inside a kernel would then abort the process."""
    alive = worker()
    if alive is not None:
        _abandon(alive, process)
    if os.getpid() == process:
        thread.join(SECONDS_AT_EXIT)


def _check_urgency(priority: object, deadline: object) -> None:
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise ValueError(f"priority must be an integer, got {priority!r}")
    if deadline is not None and not (
        isinstance(deadline, int | float) and not isinstance(deadline, bool) and 0 <= deadline < math.inf
    ):
        raise ValueError(f"deadline must be seconds from now, >= 0, or None, got {deadline!r}")
