"""A worker without a thread: its turns are taken by hand, on a clock that stands still."""

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine import RefineOptions, Refiner, Request
from engine.batch import StepBatch
from engine.kernels import PAGE_SIZE
from engine.kv_cache import KVCache
from engine.scheduler import Scheduler
from engine.service.admission import Admission
from engine.service.metrics import Reporter
from engine.service.ticket import Finished, Ticket
from engine.service.worker import Worker
from tests.engine.test_scheduler import VOCABULARY, Ledger, sequential

POISON = 19
"""As a prompt's first token: every pass that feeds it fails."""
NAN = 20
"""As a prompt's first token: its logits are NaN."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Record:
    """Metrics as they come in."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str | None]] = Counter()
        self.levels: dict[str, int] = {}
        self.durations: dict[str, list[float]] = {"queue_seconds": [], "service_seconds": []}

    def count(self, name: str, amount: int, reason: str | None = None) -> None:
        self.counts[name, reason] += amount

    def level(self, name: str, value: int) -> None:
        self.levels[name] = value

    def observe(self, name: str, seconds: float) -> None:
        self.durations[name].append(seconds)


class Fragile(Ledger):
    """A Ledger that fails on poison, and once whenever ``failures`` holds something that may be raised now."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[Exception] = []
        self.passes = 0
        self._failed = True  # no failure in the first pass: two in turn end a request, but for those of the device loop

    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        self.passes += 1
        of_loop = batch.logit_rows is None
        injected = bool(self.failures) and (of_loop or not self._failed)
        poisoned = bool(((batch.positions == 0) & (batch.token_ids == POISON)).any())
        self._failed = self._failed if of_loop else injected or poisoned
        if injected:
            raise self.failures.pop()
        if poisoned:
            raise RuntimeError("poisoned")
        hidden = super().forward(batch, cache)
        first_tokens = cache.k[0].view(-1, PAGE_SIZE)[batch.block_table[:, 0].long(), 0]
        bad = (first_tokens == NAN).repeat_interleave(batch.row_start.diff().long())
        if batch.logit_rows is None:
            hidden[: self.rows][bad] = torch.nan
        else:
            hidden[bad[batch.logit_rows]] = torch.nan
        return hidden


def answer(prompt: list[int], limit: int) -> list[int]:
    return sequential(prompt, limit, [])


def make_refiner(model: Ledger, **limits: int) -> Refiner:
    settings = {"max_batch_tokens": 12, "kv_cache_tokens": 8 * 32, "max_batch_size": 3, **limits}
    return Refiner(model, VOCABULARY, **settings)


class Bench:
    """A worker on a Fragile model: pool of 8 pages, three places, twelve rows."""

    def __init__(self, max_requests: int = 100, max_tokens: int = 10_000) -> None:
        self.model, self.clock, self.record = Fragile(), Clock(), Record()
        self.refiner = make_refiner(self.model)
        self.admission = Admission(max_requests, max_tokens, self.clock)
        self.worker = Worker(self.refiner, self.admission, Reporter(self.record), self.clock)
        self.numbers = 0

    @property
    def scheduler(self) -> Scheduler:
        return self.refiner._alive()

    def submit(self, prompt: list[int], limit: int = 5, deadline: float | None = None, **more: Any) -> Ticket:
        request, options = (
            Request(prompt_ids=prompt, draft_ids=more.pop("draft", None)),
            RefineOptions(max_new_tokens=limit),
        )
        self.numbers += 1
        ticket = Ticket(
            request=request, options=options, number=self.numbers, priority=more.get("priority", 0), entered=self.clock(),
            deadline=None if deadline is None else self.clock() + deadline, streamed=more.get("streamed", False),
            sequence=self.refiner._sequence(request, options),
        )  # fmt: skip
        post = partial(self.worker.inbox.post, partial(self.worker.enter, ticket), ticket.mailbox)
        self.admission.enter(ticket.tokens, post)
        return ticket

    def turns(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.worker.turn(block=False)
            self.check()

    def until(self, *tickets: Ticket) -> None:
        for _ in range(2000):
            if all(ticket.ended for ticket in tickets):
                return
            self.turns()
        raise AssertionError("requests that never end")

    def check(self) -> None:
        self.refiner.check_integrity()
        waiting = [ticket for queue in self.worker._queues.values() for ticket in queue]
        unheard = len(self.worker.inbox)
        if not unheard:
            assert self.admission.requests == len(waiting)
            assert self.admission.tokens == sum(ticket.tokens for ticket in waiting)
        assert self.scheduler.load == len(self.worker._running)

    def free(self) -> int:
        return self.scheduler.cache.pool.free_count


def tokens(ticket: Ticket) -> list[int]:
    """The answer of a ticket that has ended well."""
    outcome = ticket.mailbox.take()
    assert isinstance(outcome, Finished), outcome
    return ticket.sequence.final
