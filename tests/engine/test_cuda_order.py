"""What the engine tells CUDA, in which order: on a stand-in, as on most machines nothing else notices a wrong one."""

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from engine import step_runner
from engine.loop_slot import Reading
from engine.step_runner import CudaRecorder, GraphRunner, StepKind
from engine.stream_order import StreamOrder
from tests.engine.cuda_stand_in import Cuda, logged

DEVICE = torch.device("cuda:1")
STEP = StepKind(16)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def test_a_warm_up_and_its_capture_are_one_go_on_one_stream(cuda: Cuda) -> None:
    """The warm-up comes behind the current stream's work and before what follows there."""
    runner = GraphRunner(logged(cuda), CudaRecorder(DEVICE))
    runner.launch(STEP)
    warm_up = ["side waits for main", "step on side", "main waits for side"]
    assert cuda.taken() == [*warm_up, "begin on side", "step on side", "end on side"]
    with cuda.stream(cuda.Stream()):
        runner.launch(STEP)
    assert cuda.taken() == ["replay on side 2"]


def refused() -> None:
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(("spoilt", "tells_allocator"), [(False, True), (True, True), (True, False)])
def test_a_capture_that_fails_leaves_nothing_begun(spoilt: bool, tells_allocator: bool, cuda: Cuda) -> None:
    recorder = CudaRecorder(DEVICE)
    cuda.spoilt, cuda.tells_allocator = spoilt, tells_allocator
    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.capture(refused)
    log = cuda.taken()
    assert log[:2] == ["begin on side", "end on side"]
    assert log[-1] == "reset"
    assert_nothing_is_underway(cuda)


@pytest.mark.parametrize("tells_allocator", [True, False])
def test_a_capture_that_cannot_be_ended_leaves_nothing_begun(tells_allocator: bool, cuda: Cuda) -> None:
    """As when another thread waits for the whole device meanwhile."""
    recorder = CudaRecorder(DEVICE)
    cuda.spoilt, cuda.tells_allocator = True, tells_allocator
    with pytest.raises(RuntimeError, match="previous error during capture"):
        recorder.capture(lambda: None)
    assert_nothing_is_underway(cuda)


def assert_nothing_is_underway(cuda: Cuda) -> None:
    assert cuda.current == "main"
    assert not cuda.underway
    torch.cuda.empty_cache()
    assert not step_runner._CAPTURING.locked()


def test_a_capture_without_memory_is_tried_again_with_what_the_cache_held(cuda: Cuda) -> None:
    recorder = CudaRecorder(DEVICE)
    left = 1

    def step() -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory")

    recorder.capture(step)
    assert cuda.taken() == ["begin on side", "end on side", "reset", "empty cache", "begin on side", "end on side"]
    left = 2
    with pytest.raises(torch.OutOfMemoryError):
        recorder.capture(step)
    assert left == 0
    assert_nothing_is_underway(cuda)


def test_captures_of_two_engines_take_turns(cuda: Cuda) -> None:
    """The stand-in refuses a second one meanwhile."""
    first, second = CudaRecorder(DEVICE), CudaRecorder(DEVICE)
    inside = threading.Event()
    failed: list[BaseException] = []

    def slow() -> None:
        inside.set()
        time.sleep(0.2)

    def run(recorder: CudaRecorder, step: Callable[[], None]) -> None:
        try:
            recorder.capture(step)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in ((first, slow), (second, lambda: None))]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert not failed
    assert cuda.taken() == ["begin on side", "end on side", "begin on side 2", "end on side 2"]


def test_callers_on_other_streams_come_behind_each_other(cuda: Cuda) -> None:
    order = StreamOrder(DEVICE)
    order.enter()
    assert cuda.taken() == []  # one stream orders its work itself
    with cuda.stream(cuda.Stream()):
        order.enter()
        assert cuda.taken() == ["side waits for main"]
        order.enter()
    order.enter()
    assert cuda.taken() == ["main waits for side"]
    with cuda.stream(cuda.Stream()):
        order.enter()
    cuda.taken()
    order.wait()  # from wherever
    assert cuda.taken() == ["host waits for side 2"]


def test_devices_without_streams_need_no_order() -> None:
    order = StreamOrder(torch.device("cpu"))
    order.enter()
    order.wait()


def test_a_device_that_is_lost_can_be_closed(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    order = StreamOrder(DEVICE)
    order._last = SimpleNamespace(synchronize=lost)  # type: ignore[assignment]
    order.wait()


def test_a_reading_is_whole_before_anyone_looks_at_it(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into pinned memory, so that the copy waits for nobody; the event comes behind the copy, the host behind the event."""
    buffer = SimpleNamespace(
        copy_=lambda source, non_blocking: cuda.log.append(f"copy on {cuda.current}, {non_blocking}")
    )

    def empty(shape: object, **options: object) -> SimpleNamespace:
        assert options == {"dtype": torch.int32, "device": "cpu", "pin_memory": True}
        return buffer

    monkeypatch.setattr(torch, "empty", empty)
    tensor = SimpleNamespace(is_cuda=True, shape=(3,), dtype=torch.int32, device=DEVICE)
    with cuda.stream(cuda.Stream()):
        reading = Reading(tensor)  # type: ignore[arg-type]
    assert cuda.taken() == ["copy on side, True", "event on side"]
    assert not reading.ready()
    assert cuda.taken() == []
    assert reading.wait() is buffer  # type: ignore[comparison-overlap]
    assert cuda.taken() == ["host waits for the event"]
    assert reading.ready()
