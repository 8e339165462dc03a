"""The engine's turns, one by one: who enters when, and what ends a request."""

import gc
import weakref
from typing import Any

import pytest

from engine import DeadlineExceeded, EngineDead, EngineError, NonFiniteLogits, QueueFull
from engine.service.mailbox import Mailbox
from engine.service.ticket import Progress
from tests.engine.service.helpers import NAN, POISON, Bench, answer, tokens


def test_a_higher_priority_enters_first_and_equal_ones_in_turn() -> None:
    bench = Bench()
    bench.turns()
    order = [bench.submit([2, i], limit=40, priority=p) for i, p in enumerate([0, 5, 0, -1, 5, 7, 0])]
    started: list[int] = []
    for _ in range(2000):
        bench.turns()
        started += [t.number for t in order if t.started is not None and t.number not in started]
        if all(t.ended for t in order):
            break
    assert started[:3] == [2, 5, 6] or sorted(started[:3]) == [2, 5, 6]  # three places at once
    assert started[3:] == [1, 3, 7, 4]
    assert [tokens(t) for t in order] == [answer([2, i], 40) for i in range(7)]


def test_a_large_request_is_not_overtaken_for_lack_of_pages() -> None:
    bench = Bench()
    running = bench.submit([2, 3], limit=150)  # 5 of 8 pages
    bench.turns()
    large, small = bench.submit([2, 4], limit=120), bench.submit([2, 5], limit=1)
    bench.turns()
    assert (large.started, small.started) == (None, None)
    urgent = bench.submit([2, 6], limit=1, priority=1)
    bench.turns()
    assert urgent.ended
    bench.until(running, large, small)
    assert [len(tokens(t)) > 0 for t in (running, large, small)] == [True] * 3


@pytest.mark.parametrize("where", ["queued", "running", "unheard"])
def test_cancelling_frees_pages_before_the_next_step(where: str) -> None:
    bench = Bench()
    ticket = bench.submit([2, 3], limit=60)
    others = [bench.submit([2, 4 + i], limit=50) for i in range(4 if where == "queued" else 0)]
    if where == "queued":
        ticket, others[2] = others[2], ticket
    if where != "unheard":
        bench.turns()
        assert (ticket.started is None) == (where == "queued")
    passes = bench.model.passes
    bench.worker.inbox.whisper(lambda: bench.worker.leave(ticket))
    bench.turns()
    assert ticket.ended
    assert bench.model.passes <= passes + 1
    if not others:
        assert bench.free() == 8
        assert bench.model.passes == passes
    bench.worker.leave(ticket)  # again: harmless
    bench.until(*others)
    assert [tokens(t) for t in others] == [answer(t.request.prompt_ids or [], t.options.max_new_tokens) for t in others]
    assert bench.record.counts["requests", "cancelled"] == 1


@pytest.mark.parametrize("paused", [False, True])
def test_deadlines_end_requests_wherever_they_are(paused: bool) -> None:
    bench = Bench()
    running, other = bench.submit([2, 3], limit=90, deadline=5), bench.submit([2, 4], limit=90)
    queued = bench.submit([2, 5], limit=90, deadline=4)
    bench.turns()
    assert (running.started, queued.started) == (bench.clock.now, None)
    if paused:
        bench.worker.pause(Mailbox(), finish=False)
    bench.clock.now += 3.999
    bench.turns()
    assert not running.ended
    assert not queued.ended
    bench.clock.now += 0.001
    bench.turns()
    assert queued.ended
    assert not running.ended
    bench.clock.now += 1
    bench.turns()
    for ticket, words in (
        (running, "5.000 s after its entry, after"),
        (queued, "4.000 s after its entry, in the queue"),
    ):
        error = ticket.mailbox.take()
        assert isinstance(error, DeadlineExceeded)
        assert words in str(error)
    assert bench.free() == 8 - 3
    bench.worker.resume()
    bench.until(other)
    assert tokens(other) == answer([2, 4], 90)


def test_a_deadline_that_has_passed_costs_no_step() -> None:
    bench = Bench()
    late = bench.submit([2, 3], deadline=0)
    bench.turns()
    assert isinstance(late.mailbox.take(), DeadlineExceeded)
    assert bench.model.passes == 0


def test_poison_and_nan_fail_alone() -> None:
    bench = Bench()
    good = [bench.submit([2, 3 + i], limit=20) for i in range(6)]
    bad, nan = bench.submit([POISON, 2], priority=1), bench.submit([NAN, 2], priority=1)
    bench.until(*good, bad, nan)
    assert type(bad.mailbox.take()) is EngineError
    assert isinstance(nan.mailbox.take(), NonFiniteLogits)
    assert [tokens(t) for t in good] == [answer([2, 3 + i], 20) for i in range(6)]
    assert bench.record.counts["requests", "error"] == 2


def test_pausing_stops_steps_at_once_or_when_the_batch_is_done() -> None:
    bench = Bench()
    first = [bench.submit([2, 3 + i], limit=30) for i in range(3)]
    bench.turns()
    at_once: Mailbox[bool] = Mailbox()
    bench.worker.pause(at_once, finish=False)
    assert at_once.take() is True
    passes = bench.model.passes
    later = bench.submit([2, 9], limit=2)
    bench.turns(3)
    assert bench.model.passes == passes
    finished: Mailbox[bool] = Mailbox()
    bench.worker.pause(finished, finish=True)
    bench.turns()
    early: Mailbox[bool] = Mailbox()
    bench.worker.pause(early, finish=True)
    bench.worker.resume()
    assert "resumed" in str(early.take())
    bench.worker.pause(finished, finish=True)
    bench.until(*first)
    assert later.started is None
    assert finished.take() is True
    bench.turns(2)
    assert later.started is None
    bench.worker.resume()
    bench.until(later)
    assert [tokens(t) for t in first] == [answer([2, 3 + i], 30) for i in range(3)]


def test_a_pause_that_is_withdrawn_leaves_those_of_others() -> None:
    bench = Bench()
    running = bench.submit([2, 3], limit=60)
    bench.turns()
    kept, gone, waiting = Mailbox[bool](), Mailbox[bool](), Mailbox[bool]()
    bench.worker.pause(gone, finish=True)
    bench.worker.withdraw(gone)
    passes = bench.model.passes
    bench.turns()
    assert bench.model.passes == passes + 1  # it was the only one: the engine goes on
    bench.worker.pause(kept, finish=False)
    bench.worker.pause(gone, finish=False)
    bench.worker.withdraw(gone)
    bench.worker.withdraw(gone)
    passes = bench.model.passes
    bench.turns(2)
    assert bench.model.passes == passes
    bench.worker.pause(waiting, finish=True)
    assert waiting.take() is None
    bench.worker.pause(kept, finish=False)
    assert "another call" in str(waiting.take())  # the batch is not done
    bench.worker.pause(waiting, finish=True)
    bench.worker.leave(running)
    bench.worker.pause(kept, finish=True)
    assert waiting.take() is kept.take() is True
    bench.worker.resume()
    bench.worker.withdraw(kept)
    running = bench.submit([2, 3], limit=60)
    bench.until(running)
    assert tokens(running) == answer([2, 3], 60)


def test_the_queue_is_bounded_in_requests_and_tokens() -> None:
    bench = Bench(max_requests=3, max_tokens=100)
    bench.worker.pause(Mailbox(), finish=False)
    large = bench.submit([2, 3], limit=150)  # more than the limit, but nobody waits
    with pytest.raises(QueueFull, match="1 requests of 152 tokens wait, and 7 more"):
        bench.submit([2, 3])
    bench.worker.resume()
    bench.turns()
    assert large.started is not None
    bench.worker.pause(Mailbox(), finish=False)
    waiting = [bench.submit([2, 3]) for _ in range(3)]
    with pytest.raises(QueueFull, match="3 requests of 21 tokens wait"):
        bench.submit([2, 3])
    bench.worker.inbox.whisper(lambda: bench.worker.leave(waiting[0]))
    bench.turns()
    with pytest.raises(QueueFull, match="2 requests of 14 tokens wait, and 92 more"):
        bench.submit([2, 3], limit=90)
    assert bench.submit([2, 3], limit=84)


def test_closing_finishes_or_ends_what_was_let_in() -> None:
    for drain in (True, False):
        bench, done = Bench(), Mailbox[bool]()
        everyone = [bench.submit([2, 3 + i], limit=20) for i in range(6)]
        bench.turns()
        bench.worker.pause(Mailbox(), finish=False)  # would be in the way of a drain
        bench.worker.close(done, drain=drain)
        with pytest.raises(EngineDead, match="closed"):
            bench.submit([2, 3])
        refused: Mailbox[bool] = Mailbox()
        bench.worker.pause(refused, finish=False)
        assert isinstance(refused.take(), EngineDead)
        assert done.take() is None
        bench.worker.run()
        assert done.take() is True
        outcomes = [t.mailbox.take() for t in everyone]
        if drain:
            assert [t.sequence.final for t in everyone] == [answer([2, 3 + i], 20) for i in range(6)]
        assert {type(o) is EngineDead for o in outcomes} == {not drain}
        assert bench.record.levels == {"queued": 0, "queued_tokens": 0, "running": 0, "pages_free": 0}
        with pytest.raises(EngineDead):
            bench.worker.inbox.post(lambda: None, Mailbox())


@pytest.mark.parametrize("closing", [False, True])
def test_a_failure_that_is_nobodys_is_told_to_everybody(closing: bool) -> None:
    bench = Bench()
    running = [bench.submit([2, 3 + i], limit=60) for i in range(5)]
    bench.turns()
    unheard = bench.submit([2, 3])
    asked = Mailbox[bool]()
    if closing:
        bench.worker.inbox.post(lambda: bench.worker.close(asked, drain=True), asked)
    else:
        bench.worker.inbox.post(lambda: bench.worker.pause(asked, finish=True), asked)
    held = weakref.ref(bench.scheduler.cache.k[0])
    bench.model.failures.append(IndexError("of the engine's own"))
    bench.worker.run()
    for ticket in (*running, unheard):
        error = ticket.mailbox.take()
        assert isinstance(error, EngineDead)
        assert "IndexError('of the engine's own')" in str(error).replace('"', "'")
        assert isinstance(error.__cause__, IndexError)
    assert isinstance(asked.take(), bool if closing else EngineDead)
    with pytest.raises(EngineDead, match="closed"):
        bench.submit([2, 3])
    gc.collect()
    assert held() is None  # the cache went, although errors and tickets are still held


def test_readers_are_told_every_new_iterate_and_the_latest_wins() -> None:
    bench = Bench()
    prompt = max(([2, i] for i in range(3, 18)), key=lambda p: len(answer(p, 30)))
    ticket = bench.submit(prompt, limit=30, streamed=True)
    right, seen, steps = answer(prompt, 30), [], []
    while not ticket.ended:
        bench.turns(2)
        news: Any = ticket.mailbox.take()
        if isinstance(news, Progress):
            seen.append(news)
            steps.append(news.step)
    assert steps == sorted(set(steps))
    assert steps[-1] > len(steps)  # two steps, one iterate
    for news in seen:
        assert news.final == right[: len(news.final)]
        assert 0 < len(news.final) + len(news.tentative) <= 30
    assert ticket.sequence.final == right


def test_metrics_add_up() -> None:
    bench = Bench()
    tickets = [bench.submit([2, 3 + i], limit=20) for i in range(5)]
    bench.turns()
    assert bench.record.levels == {"queued": 2, "queued_tokens": 44, "running": 3, "pages_free": 5}
    bench.clock.now += 2
    bench.until(*tickets)
    bench.turns()
    assert bench.record.levels == {"queued": 0, "queued_tokens": 0, "running": 0, "pages_free": 8}
    sequences = [t.sequence for t in tickets]
    counts = bench.record.counts
    assert counts["tokens", None] == sum(len(s.final) for s in sequences)
    assert counts["steps", None] == sum(s.steps for s in sequences)
    assert counts["forward_tokens", None] == sum(s.forward_tokens for s in sequences)
    assert counts["requests", "eos"] + counts["requests", "length"] == 5
    assert sorted(bench.record.durations["queue_seconds"]) == [0, 0, 0, 2, 2]
    assert sorted(bench.record.durations["service_seconds"]) == [0, 0, 2, 2, 2]
