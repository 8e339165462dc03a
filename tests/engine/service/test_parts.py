"""Mailbox, admission, reporter and the Prometheus adapter, each by itself."""

import asyncio
import pickle
import threading
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from engine import EngineDead, EngineError, QueueFull
from engine.service.admission import LONGEST_RETRY, SHORTEST_RETRY, Admission
from engine.service.mailbox import Mailbox
from engine.service.metrics import COUNTERS, DURATIONS, LEVELS, Reporter
from engine.service.prometheus import PrometheusMetrics
from engine.service.ticket import _split
from tests.engine.service.helpers import Bench, Clock, Record


def test_mailbox_gives_the_latest_and_raises_errors() -> None:
    async def read() -> None:
        box: Mailbox[int] = Mailbox()
        for value in (1, 2, 3):
            box.put(value)
        assert await box.get() == 3
        assert box.take() is None
        later = asyncio.ensure_future(box.get())
        await asyncio.sleep(0)
        thread = threading.Thread(target=lambda: [box.put(value) for value in (4, 5)])
        thread.start()
        thread.join()
        assert await later == 5
        box.put(EngineError("no"))
        with pytest.raises(EngineError, match="no"):
            await box.get()

    asyncio.run(asyncio.wait_for(read(), 20))


def test_a_cancelled_reader_loses_no_value() -> None:
    async def read() -> None:
        box: Mailbox[int] = Mailbox()
        reader = asyncio.ensure_future(box.get())
        await asyncio.sleep(0)
        reader.cancel()
        box.put(1)  # wakes one who is just being cancelled
        await asyncio.wait([reader])
        assert reader.cancelled()
        assert await box.get() == 1

    asyncio.run(asyncio.wait_for(read(), 20))


def test_a_waiting_reader_has_one_callback_pending_however_much_is_put() -> None:
    async def read() -> None:
        box: Mailbox[int] = Mailbox()
        reader = asyncio.ensure_future(box.get())
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        pending = len(loop._ready)  # type: ignore[attr-defined]
        for value in range(100):
            box.put(value)
        assert len(loop._ready) == pending + 1  # type: ignore[attr-defined]
        assert await reader == 99

    asyncio.run(asyncio.wait_for(read(), 20))


def test_the_retry_hint_is_how_long_the_queue_took_lately() -> None:
    clock = Clock()
    admission = Admission(1000, 1000, clock)

    def refused() -> float:
        with pytest.raises(QueueFull) as error:
            admission.check(10_000)
        assert admission.retry_after == error.value.retry_after
        return error.value.retry_after

    admission.enter(100, lambda: None)
    assert refused() == 1.0  # nobody has been served yet
    for _ in range(10):  # 10 tokens a second
        admission.enter(20, lambda: None)
        admission.leave(20, served=True)
        clock.now += 2
    assert refused() == pytest.approx(100 / 10)
    admission.enter(100, lambda: None)
    admission.leave(100, served=False)  # gave up: says nothing of the speed
    assert refused() == pytest.approx(100 / 10)
    clock.now += 10_000  # a standing engine
    assert refused() == LONGEST_RETRY
    for _ in range(64):
        admission.enter(20, lambda: None)
        admission.leave(20, served=True)
    assert refused() == SHORTEST_RETRY


def test_nobody_is_counted_in_whose_delivery_fails() -> None:
    admission = Admission(2, 100, Clock())

    def fail() -> None:
        raise EngineDead("gone")

    with pytest.raises(EngineDead, match="gone"):
        admission.enter(10, fail)
    assert (admission.requests, admission.tokens) == (0, 0)
    admission.close("first")
    admission.close("second")
    with pytest.raises(EngineDead, match="first"):
        admission.check()


def test_queue_full_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(QueueFull("full", 2.5)))
    assert (str(error), error.retry_after) == ("full", 2.5)


@pytest.mark.parametrize(
    ("final", "whole", "parts"),
    [
        ("ab", "abc", ("ab", "c")),
        ("ab\ufffd", "abé", ("ab", "é")),  # the character is complete in the guess alone
        ("ab\ufffd", "ab\ufffd", ("ab", "\ufffd")),
        ("", "", ("", "")),
        ("abx", "aby", ("ab", "y")),
        ("abc", "ab", ("ab", "")),
        (None, None, (None, None)),
    ],
)
def test_text_splits_where_it_is_settled(final: Any, whole: Any, parts: Any) -> None:
    assert _split(final, whole) == parts


def test_levels_are_told_when_they_change() -> None:
    class Log(Record):
        told = 0

        def level(self, name: str, value: int) -> None:
            self.told += 1

    log = Log()
    reporter = Reporter(log)
    for value in (1, 1, 2, 2, 1):
        reporter.levels(queued=value)
    assert log.told == 3


def test_metrics_that_raise_are_dropped_with_one_message(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Record):
        def count(self, name: str, amount: int, reason: str | None = None) -> None:
            raise OSError("metrics")

    broken = Broken()
    reporter = Reporter(broken)
    for _ in range(3):
        reporter.ended("eos")
    reporter.levels(queued=1)
    assert caplog.text.count("no further metrics") == 1
    assert broken.levels == {}


def test_prometheus_shows_what_was_reported() -> None:
    registry = CollectorRegistry()
    metrics = PrometheusMetrics(registry, "refiner")
    bench = Bench()
    bench.worker._reporter = Reporter(metrics)
    tickets = [bench.submit([2, 3 + i], limit=20) for i in range(4)]
    bench.turns()
    assert registry.get_sample_value("refiner_running") == 3
    bench.until(*tickets)
    bench.turns()
    text = generate_latest(registry).decode()
    for name in COUNTERS:
        assert f"refiner_{name}_total" in text
    for name in LEVELS:
        assert f"\nrefiner_{name} " in text
    for name in DURATIONS:
        assert registry.get_sample_value(f"refiner_{name}_count") == 4
    answers = sum(registry.get_sample_value("refiner_requests_total", {"reason": r}) or 0 for r in ("eos", "length"))
    assert answers == 4
    assert registry.get_sample_value("refiner_tokens_total") == sum(len(t.sequence.final) for t in tickets)
    assert registry.get_sample_value("refiner_pages_free") == 8
    metrics.close()
    assert generate_latest(registry) == b""
    PrometheusMetrics(registry, "refiner").close()  # the names are free again
