"""Anything in any order: pages stay whole, nobody is forgotten, and answers are what they are without the chaos."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine import DeadlineExceeded, EngineError, NonFiniteLogits, QueueFull, RequestTooLong
from engine.service.mailbox import Mailbox
from engine.service.ticket import Finished, Progress, Ticket
from tests.engine.service.helpers import NAN, POISON, Bench, answer
from tests.engine.test_scheduler import SIZE

LIMIT_REQUESTS, LIMIT_TOKENS = 6, 250


class Chaos(RuleBasedStateMachine):
    """Requests, good and bad, deadlines, cancellations, pauses and failures of passes."""

    tokens = st.lists(st.integers(0, SIZE - 1), max_size=40)

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(LIMIT_REQUESTS, LIMIT_TOKENS)
        self.alive: list[Ticket] = []
        self.submitted = 0

    @rule(
        prompt=st.lists(st.integers(0, POISON - 1), min_size=1, max_size=70),
        bad=st.sampled_from([None, None, None, POISON, NAN]),
        draft=tokens,
        limit=st.integers(1, 90),
        priority=st.integers(-1, 1),
        deadline=st.one_of(st.none(), st.integers(0, 9)),
        streamed=st.booleans(),
    )
    def submit(
        self, prompt: list[int], bad: int | None, draft: list[int], limit: int, priority: int, deadline: int | None,
        streamed: bool,
    ) -> None:  # fmt: skip
        if bad is not None:
            prompt = [bad, *prompt]
        requests, waiting = self.bench.admission.requests, self.bench.admission.tokens
        need = len(prompt) + limit
        full = bool(requests) and (requests >= LIMIT_REQUESTS or waiting + need > LIMIT_TOKENS)
        if full:
            with pytest.raises(QueueFull) as refused:
                self.bench.submit(prompt, limit)
            assert 0 < refused.value.retry_after <= 60
            return
        ticket = self.bench.submit(prompt, limit, deadline, draft=draft, priority=priority, streamed=streamed)
        self.alive.append(ticket)
        self.submitted += 1

    @rule(length=st.integers(200, 300))
    def submit_too_long(self, length: int) -> None:
        with pytest.raises(RequestTooLong):
            self.bench.submit([2] * length, 57)

    @rule(count=st.integers(1, 4))
    def turn(self, count: int) -> None:
        for _ in range(count):
            self.bench.turns()
            self.collect()

    @rule(seconds=st.integers(1, 4))
    def wait(self, seconds: int) -> None:
        self.bench.clock.now += seconds

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 50))
    def cancel(self, which: int) -> None:
        ticket = self.alive.pop(which % len(self.alive))
        self.bench.worker.inbox.whisper(lambda: self.bench.worker.leave(ticket))
        self.bench.turns()
        assert ticket.ended
        assert ticket.sequence.pages == []
        self.collect()

    @rule(finish=st.booleans())
    def pause(self, finish: bool) -> None:
        mailbox: Mailbox[bool] = Mailbox()
        self.bench.worker.inbox.post(lambda: self.bench.worker.pause(mailbox, finish=finish), mailbox)

    @rule()
    def resume(self) -> None:
        self.bench.worker.inbox.post(self.bench.worker.resume, Mailbox())

    @rule(failure=st.sampled_from([MemoryError("injected"), RuntimeError("injected")]))
    def fail_a_pass(self, failure: Exception) -> None:
        self.bench.model.failures = [failure]

    @invariant()
    def whole(self) -> None:
        self.bench.check()

    def collect(self) -> None:
        for ticket in self.alive:
            self.inspect(ticket, ticket.mailbox.take())
        self.alive = [ticket for ticket in self.alive if not ticket.ended]

    def inspect(self, ticket: Ticket, news: Progress | Finished | EngineError | None) -> None:
        prompt, limit = ticket.request.prompt_ids or [], ticket.options.max_new_tokens
        assert ticket.ended == isinstance(news, Finished | EngineError)
        if isinstance(news, DeadlineExceeded):
            assert ticket.deadline is not None
            assert ticket.deadline <= self.bench.clock.now
        elif isinstance(news, EngineError):
            assert (type(news), prompt[0]) in {(EngineError, POISON), (NonFiniteLogits, NAN)}
        elif isinstance(news, Finished):
            assert ticket.sequence.final == answer(prompt, limit)
            assert prompt[0] not in (POISON, NAN)
        elif isinstance(news, Progress):
            assert ticket.streamed
            assert news.final == answer(prompt, limit)[: len(news.final)]
        if ticket.deadline is not None and self.bench.clock.now >= ticket.deadline:
            assert ticket.ended

    def teardown(self) -> None:
        """Whatever there was, a drain answers everybody."""
        done: Mailbox[bool] = Mailbox()
        self.bench.worker.inbox.post(lambda: self.bench.worker.close(done, drain=True), done)
        pool = self.bench.scheduler.cache.pool
        for _ in range(5000):
            if not self.bench.worker.turn(block=False):
                break
            self.bench.check()
            self.collect()
        else:
            raise AssertionError("no end")
        self.collect()
        assert not self.alive
        assert pool.free_count == 8
        counts = self.bench.record.counts
        assert sum(count for (name, _), count in counts.items() if name == "requests") == self.submitted
        self.bench.worker.run()
        assert done.take() is True


TestChaos = Chaos.TestCase
TestChaos.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
