"""Sequences that are looked at while the device loop moves them."""

from typing import Any

import pytest
from hypothesis import given, settings

from engine import device_loop
from engine.jacobi import JacobiSequence
from engine.service.ticket import Progress
from tests.engine.service.helpers import Bench, answer
from tests.engine.test_device_loop import OPTIONS, TOKENS, make, outcome, run, start

Iterate = tuple[int, list[int], list[int]]


def watched(device: bool, sequence: JacobiSequence) -> list[Iterate]:
    """Steps, final tokens and guess after every step of the scheduler that moved it on."""
    scheduler, seen = make(device), []
    sequence.observed = True
    scheduler.add(sequence)
    for _ in range(400):
        scheduler.step()
        scheduler.check_integrity()
        now = (sequence.steps, list(sequence.final), sequence.tentative)
        if sequence.finish_reason:
            break
        if sequence.steps and (not seen or now != seen[-1]):
            seen.append(now)
    assert scheduler.load == 0
    return seen


@settings(max_examples=80, deadline=None)
@given(TOKENS.filter(bool), TOKENS, OPTIONS)
def test_iterates_are_those_of_the_host(prompt: list[int], draft: list[int], options: dict[str, Any]) -> None:
    """Step by step where the window does not follow acceptance, whose rates are rounded differently there."""
    options = options | {"window": 4 if options["window"] == "auto" else options["window"]}
    options["max_new_tokens"] = min(options["max_new_tokens"], 32)  # the host re-aligns by the latest 32 places only
    host, device = (start(prompt, draft[:32], **options) for _ in range(2))
    if host.finish_reason:
        return
    expected, found = watched(False, host), watched(True, device)
    assert outcome(device) == outcome(host)
    assert found == expected


def test_nothing_is_read_of_those_that_nobody_looks_at(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[JacobiSequence] = []
    plain = device_loop.read_text

    def record(state: Any, slot: int, sequence: JacobiSequence) -> Any:
        read.append(sequence)
        return plain(state, slot, sequence)

    monkeypatch.setattr(device_loop, "read_text", record)
    seen, unseen = (start([5, 10], [], max_new_tokens=30, window=1) for _ in range(2))
    seen.observed = True
    run(make(True), [seen, unseen])
    assert outcome(seen) == outcome(unseen)
    assert sum(sequence is unseen for sequence in read) == 1  # its answer
    assert sum(sequence is seen for sequence in read) >= seen.steps


@pytest.mark.parametrize("fails", [False, True])
def test_a_stream_from_the_loop(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterates come while it runs; one that has to begin anew tells its steps again, from the first."""
    monkeypatch.setenv("DIFFPO_LOOP", "device")
    bench = Bench()
    prompt = max(([2, i] for i in range(3, 18)), key=lambda p: len(answer(p, 30)))
    ticket = bench.submit(prompt, limit=30, streamed=True)
    right, steps = answer(prompt, 30), []
    while not ticket.ended:
        bench.turns()
        news = ticket.mailbox.take()
        if isinstance(news, Progress):
            steps.append(news.step)
            assert news.final == right[: len(news.final)]
            assert 0 < len(news.final) + len(news.tentative) <= 30
            if fails and steps == [1, 2, 3]:
                bench.model.failures.append(RuntimeError("injected"))
    assert ticket.sequence.final == right
    assert not bench.model.failures
    told = 3 if fails else 0
    assert steps[:told] + list(range(1, len(steps) - told + 1)) == steps
    assert len(steps) - told == ticket.sequence.steps - 1
