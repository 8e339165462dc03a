"""Closing a refiner: what was launched is waited for, graphs are freed, weights and cache go at once."""

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest

from engine import RefineOptions, Refiner
from engine.batch import StepBatch
from engine.device_loop import DeviceLoop
from engine.scheduler import Scheduler
from engine.step_runner import GraphRunner, StepKind
from engine.stream_order import StreamOrder
from tests.engine.checkpoints import Oracle
from tests.engine.test_device_loop import KNEE, VOCABULARY, Ledger, make, start
from tests.engine.test_step_runner import Recorder

REQUESTS = [{"prompt_ids": [5, 6, 7], "draft_ids": [8, 9]}] * 2


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """Whatever goes, goes with its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "dropped"])
@pytest.mark.parametrize("loop", ["host", "device"])
def test_weights_and_cache_go_at_once(
    loop: str, closed: bool, oracle: Callable[[str], Oracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFPO_LOOP", loop)
    refiner = Refiner.from_pretrained(oracle("llama").folder, kv_cache_tokens=2048)
    refiner.refine(REQUESTS, RefineOptions(max_new_tokens=9))
    kept = things(refiner)
    assert all(thing() is not None for thing in kept)
    if closed:
        refiner.close()
    else:
        del refiner
    assert [thing() for thing in kept] == [None] * len(kept)


def things(refiner: Refiner) -> list[weakref.ref[object]]:
    scheduler = refiner._scheduler
    assert scheduler is not None
    found = [scheduler, scheduler.model, scheduler.model.head.weight.data, scheduler.cache, *scheduler.cache.k]
    if scheduler.loop:
        found += [scheduler.loop, scheduler.loop.state.fields, scheduler.loop._runner]
    return [weakref.ref(thing) for thing in found]


@pytest.mark.usefixtures("_no_collector")
def test_a_runner_of_graphs_keeps_no_loop() -> None:
    model = Ledger()
    cache = model.new_cache(8)
    loop = DeviceLoop(model, cache, VOCABULARY, KNEE, 64, 3, lambda step: GraphRunner(step, Recorder()))
    scheduler = Scheduler(model, cache, 64, 3, loop)
    scheduler.add(start([5, 6], [], max_new_tokens=3))
    scheduler.step()
    kept = [weakref.ref(thing) for thing in (loop, model, cache)]
    scheduler.close()
    del loop, model, cache, scheduler
    assert [thing() for thing in kept] == [None] * 3


class Logged(StreamOrder):
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def enter(self) -> None:
        self.log.append("enter")

    def wait(self) -> None:
        self.log.append("wait")


def test_a_refiner_that_is_closed_waits_and_then_resets_the_graphs(oracle: Callable[[str], Oracle]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFPO_LOOP", "device")
        refiner = Refiner.from_pretrained(oracle("llama").folder, kv_cache_tokens=2048)
    scheduler, recorder = refiner._scheduler, Recorder()
    assert scheduler is not None
    assert scheduler.loop is not None
    runner = GraphRunner(recorder.step, recorder)
    runner.launch(StepKind(16))
    scheduler.loop._runner, scheduler._order = runner, Logged(recorder.log)
    recorder.log.clear()
    for _ in range(2):
        refiner.close()
    assert recorder.log == ["wait", "reset"]


@pytest.mark.parametrize("device", [False, True])
def test_every_callers_work_comes_behind_that_of_the_one_before(device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step and a cancellation: both write what all callers share."""
    model, log = Ledger(), []
    scheduler = make(device, model)
    scheduler._order = Logged(log)
    forward = model.forward

    def written(batch: StepBatch, cache: object) -> object:
        log.append("work")
        return forward(batch, cache)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "forward", written)
    one = start([5, 6, 7], [], max_new_tokens=30, window=1)
    scheduler.add(one)
    for _ in range(3):
        scheduler.step()
    assert log.count("enter") == 3
    assert log[0] == "enter"
    assert log[1] == "work"
    if scheduler.loop:
        log.clear()
        drop = scheduler.loop.drop
        monkeypatch.setattr(scheduler.loop, "drop", lambda sequence: [log.append("work"), drop(sequence)])
        scheduler.cancel(one)
        assert log == ["enter", "work"]
