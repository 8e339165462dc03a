"""The engine's thread: lets requests into the batch by priority, steps, and tells their readers."""

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Literal

from engine.errors import DeadlineExceeded, EngineDead, EngineError
from engine.kv_cache import pages_for
from engine.model import Decoder
from engine.refiner import Refiner
from engine.service.admission import Admission
from engine.service.inbox import Inbox
from engine.service.mailbox import Mailbox
from engine.service.metrics import Reporter
from engine.service.ticket import Finished, Ticket

logger = logging.getLogger("engine.service")

CLOSED = "this AsyncRefiner is closed: load a new one"


class Worker:
    """Owns a refiner from its first turn to its last; every method belongs to the thread that takes the turns.

    Others reach it through ``inbox`` alone.
    """

    def __init__(
        self, refiner: Refiner, admission: Admission, reporter: Reporter, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.inbox = Inbox()
        self._refiner = refiner
        self._admission = admission
        self._reporter = reporter
        self._clock = clock
        self._queues: dict[int, dict[Ticket, None]] = {}  # by priority; each in order of arrival
        self._running: dict[Ticket, None] = {}
        self._dated: dict[Ticket, None] = {}  # with a deadline
        self._mode: Literal["open", "finishing", "paused"] = "open"
        self._pauses: dict[Mailbox[bool], None] = {}  # asked for since the engine last went on
        self._pausing: list[Mailbox[bool]] = []  # of those, who wait for the batch to be done
        self._closing = False
        self._closers: list[Mailbox[bool]] = []

    def run(self) -> None:
        """Takes turns until closed, or until one fails; then tells everybody who still waits."""
        failure: BaseException | None = None
        try:
            while self.turn():
                pass
        except BaseException as error:
            logger.error("the engine failed; whoever waits is told", exc_info=error)
            traceback.clear_frames(error.__traceback__)  # which hold weights and cache
            failure = error
        self._shut_down(failure)

    def turn(self, *, block: bool = True) -> bool:
        """Does what was posted, then a step. ``block``: waits if there is nothing to do. False: it was the last turn."""
        self._hear(block)
        self._expire()
        if self._closing and not self._running and not self._queues:
            return False
        if self._mode == "open":
            self._let_in()
        if self._mode != "paused" and (self._running or self._queues):
            self._step()
        if self._mode == "finishing" and not self._running:
            self._stand_still()
        pool = self._refiner._alive().cache.pool
        self._reporter.levels(
            queued=self._admission.requests, queued_tokens=self._admission.tokens, running=len(self._running),
            pages_free=pool.free_count,
        )  # fmt: skip
        return True

    def enter(self, ticket: Ticket) -> None:
        """Queues a request that ``admission`` has counted in."""
        self._queues.setdefault(ticket.priority, {})[ticket] = None
        if ticket.deadline is not None:
            self._dated[ticket] = None

    def leave(self, ticket: Ticket) -> None:
        """Drops a request whose reader has gone, and frees its pages; harmless for one that has ended."""
        if not ticket.ended:
            self._remove(ticket)
            ticket.ended = True
            self._reporter.ended("cancelled")

    def pause(self, mailbox: Mailbox[bool], *, finish: bool) -> None:
        """Takes no further step; with ``finish`` not before those in the batch are done, and lets nobody in meanwhile."""
        if self._closing:
            mailbox.put(EngineDead(CLOSED))
            return
        self._pauses[mailbox] = None
        if finish and self._running:
            self._pausing.append(mailbox)
            self._mode = "finishing"
            return
        if not finish:
            self._tell_pausing(EngineError("another call stopped the engine before the batch was done: pause again"))
        self._pausing.append(mailbox)
        self._stand_still()

    def withdraw(self, mailbox: Mailbox[bool]) -> None:
        """Undoes a pause whose caller has gone; the engine goes on if there was no other."""
        if mailbox in self._pauses:
            del self._pauses[mailbox]
            if mailbox in self._pausing:
                self._pausing.remove(mailbox)
            if not self._pauses:
                self.resume()

    def resume(self) -> None:
        if not self._closing:
            self._mode = "open"
            self._pauses.clear()
            self._tell_pausing(EngineError("resumed, or closed, before the batch was done: pause again"))

    def update(self, weights: Decoder, mailbox: Mailbox[bool]) -> None:
        """Takes over new weights; requests in the batch begin anew, as their K/V and final tokens are the old ones'."""
        try:
            with self._refiner._lock:
                scheduler = self._refiner._alive()
                model = scheduler.model
                assert isinstance(model, Decoder)
                model.assign(weights)
                for ticket in self._running:
                    scheduler.cancel(ticket.sequence)
                    ticket.begin_anew()
                    scheduler.add(ticket.sequence)
        except EngineError as error:
            mailbox.put(error)
        else:
            mailbox.put(True)

    def close(self, mailbox: Mailbox[bool] | None, *, drain: bool) -> None:
        """Makes the turn in which nobody is left the last one; without ``drain`` that is this one."""
        if mailbox is not None:
            self._closers.append(mailbox)
        self.resume()
        self._closing = True
        self._admission.close(CLOSED)
        if not drain:
            for ticket in [*self._everyone()]:
                self._end(ticket, EngineDead(CLOSED), "dead")

    def _everyone(self) -> Iterator[Ticket]:
        yield from self._running
        for waiting in self._queues.values():
            yield from waiting

    def _hear(self, block: bool) -> None:
        busy = self._closing or (self._mode != "paused" and bool(self._running or self._queues))
        timeout: float | None = 0.0
        if block and not busy:
            due = min((t.deadline for t in self._dated if t.deadline is not None), default=None)
            timeout = None if due is None else max(0.0, due - self._clock())
        # no more than are there now: a flood of messages must not hold up those who run
        for _ in range(max(1, len(self.inbox))):
            action = self.inbox.get(timeout)
            if action is None:
                return
            action()
            timeout = 0.0

    def _expire(self) -> None:
        if not self._dated:
            return
        now = self._clock()
        for ticket in [t for t in self._dated if t.deadline is not None and t.deadline <= now]:
            where = "in the queue" if ticket.started is None else f"after {ticket.sequence.steps} steps"
            waited = f"not ready {now - ticket.entered:.3f} s after its entry, {where}"
            self._end(ticket, DeadlineExceeded(f"{waited}: allow more time or send less"), "deadline")

    def _let_in(self) -> None:
        """Fills the batch from the queue. Nobody overtakes one of the same or a higher priority, for lack of pages either."""
        scheduler = self._refiner._alive()
        pool = scheduler.cache.pool
        promised = sum(pool.rounded(pages_for(sequence.longest)) for sequence in scheduler.waiting)
        while self._queues and scheduler.load < scheduler.max_batch_size:
            ticket = next(iter(self._queues[max(self._queues)]))
            promised += pool.rounded(pages_for(ticket.tokens))
            if promised > pool.free_count:
                return
            self._unqueue(ticket, served=True)
            ticket.started = self._clock()
            self._running[ticket] = None
            with self._refiner._lock:
                scheduler.add(ticket.sequence)
            self._reporter.observe("queue_seconds", ticket.started - ticket.entered)

    def _step(self) -> None:
        with self._refiner._lock:
            self._refiner._drop_abandoned()
            self._refiner._alive().step()
        for ticket in [*self._running]:
            sequence = ticket.sequence
            if sequence.finish_reason is None:
                ticket.tell()
                continue
            now = self._clock()
            if ticket.started is not None:
                self._reporter.observe("service_seconds", now - ticket.started)
            if sequence.error is None:
                self._reporter.answered(len(sequence.final), sequence.steps, sequence.forward_tokens)
            self._end(ticket, sequence.error or Finished(now - ticket.entered), sequence.finish_reason)

    def _stand_still(self) -> None:
        self._mode = "paused"
        self._tell_pausing(True)

    def _tell_pausing(self, outcome: Literal[True] | EngineError) -> None:
        for mailbox in self._pausing:
            mailbox.put(outcome)
        self._pausing.clear()

    def _end(self, ticket: Ticket, outcome: Finished | EngineError, reason: str) -> None:
        self._remove(ticket)
        ticket.end(outcome)
        self._reporter.ended(reason)

    def _remove(self, ticket: Ticket) -> None:
        self._dated.pop(ticket, None)
        if ticket in self._running:
            del self._running[ticket]
            with self._refiner._lock:
                # not _alive(): on the way down the refiner may be closed already
                if self._refiner._scheduler is not None and ticket.sequence.finish_reason is None:
                    self._refiner._scheduler.cancel(ticket.sequence)
        else:
            self._unqueue(ticket, served=False)

    def _unqueue(self, ticket: Ticket, *, served: bool) -> None:
        waiting = self._queues[ticket.priority]
        del waiting[ticket]
        if not waiting:
            del self._queues[ticket.priority]
        self._admission.leave(ticket.tokens, served=served)

    def _shut_down(self, failure: BaseException | None) -> None:
        reason = CLOSED if failure is None else f"the engine failed ({failure!r:.300}): load a new AsyncRefiner"

        def dead() -> EngineDead:  # one for each: a traceback grows as its exception is raised
            error = EngineDead(reason)
            error.__cause__ = failure
            return error

        self._admission.close(reason)
        left = self.inbox.seal(reason)
        for ticket in self._everyone():
            ticket.end(dead())
            self._reporter.ended("dead")
        for mailbox in (*left, *self._pausing):
            mailbox.put(dead())
        for tickets in (self._running, self._queues, self._dated, self._pausing):
            tickets.clear()
        self._reporter.levels(queued=0, queued_tokens=0, running=0, pages_free=0)
        self._refiner.close()
        for mailbox in self._closers:
            mailbox.put(True)
