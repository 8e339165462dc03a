"""When a step is warmed up, captured and replayed, with graphs that only count."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from engine.step_runner import CudaRecorder, EagerRunner, GraphRunner, StepKind


class Recorder:
    """Writes down what happens; a graph replays by running the step it was made of."""

    def __init__(self, refuses: tuple[int, ...] = ()) -> None:
        self.log: list[str] = []
        self.refuses = refuses
        self.capturing = False

    def step(self, kind: StepKind) -> None:
        if self.capturing and kind.rows in self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.log.append(f"{'capture' if self.capturing else 'run'} {kind.rows}{' sampled' * kind.sampled}")

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        self.log.append("side")
        yield
        self.log.append("back")

    def capture(self, step: Callable[[], None]) -> "Graph":
        self.capturing = True
        try:
            step()
        finally:
            self.capturing = False
        return Graph(self.log)


class Graph:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def replay(self) -> None:
        self.log.append("replay")

    def reset(self) -> None:
        self.log.append("reset")


def test_the_first_step_warms_up_the_second_is_captured_and_all_others_replay() -> None:
    recorder = Recorder()
    runner = GraphRunner(recorder.step, recorder)
    for rows in (16, 16, 32, 16, 32, 32):
        runner.launch(StepKind(rows))
    warm_up = ["side", "run {}", "back"]
    capture = ["capture {}", "replay"]
    expected = [*warm_up, *capture], [*warm_up], ["replay"], [*capture, "replay"]
    sizes = (16, 32, 16, 32)
    assert recorder.log == [line.format(rows) for part, rows in zip(expected, sizes, strict=True) for line in part]


def test_steps_that_sample_have_graphs_of_their_own() -> None:
    recorder = Recorder()
    runner = GraphRunner(recorder.step, recorder)
    for sampled in (False, False, True, False, True, True):
        runner.launch(StepKind(16, sampled))
    ran = [line for line in recorder.log if line not in ("side", "back")]
    assert ran == [
        "run 16", "capture 16", "replay", "run 16 sampled", "replay", "capture 16 sampled", "replay", "replay",
    ]  # fmt: skip


def test_every_launch_runs_the_step_once() -> None:
    """Capturing does not run it, so a state that it moves is moved once per launch."""
    recorder = Recorder(refuses=(32,))
    runner = GraphRunner(recorder.step, recorder)
    for launches in range(1, 6):
        for rows in (16, 32):
            runner.launch(StepKind(rows))
        assert sum(line.startswith(("run", "replay")) for line in recorder.log) == 2 * launches


def test_a_size_that_cannot_be_captured_is_said_once_and_runs_without(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(refuses=(32,))
    runner = GraphRunner(recorder.step, recorder)
    for _ in range(4):
        runner.launch(StepKind(32))
    assert recorder.log == ["side", "run 32", "back"] * 4
    assert [record.message for record in caplog.records] == [
        "a step of 32 rows cannot be captured as a CUDA graph and runs without: "
        "operation not permitted when stream is capturing"
    ]


def test_an_error_of_a_step_that_runs_is_the_callers() -> None:
    def broken(kind: StepKind) -> None:
        raise RuntimeError("out of memory")

    runner = GraphRunner(broken, Recorder())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            runner.launch(StepKind(16))


def test_close_resets_every_graph() -> None:
    recorder = Recorder()
    runner = GraphRunner(recorder.step, recorder)
    for rows in (16, 16, 32, 32, 64):
        runner.launch(StepKind(rows))
    recorder.log.clear()
    runner.close()
    runner.close()
    assert recorder.log == ["reset", "reset"]


def test_eager_runs_at_once() -> None:
    recorder = Recorder()
    runner = EagerRunner(recorder.step)
    runner.launch(StepKind(16))
    runner.close()
    assert recorder.log == ["run 16"]


class Streams:
    """torch.cuda's streams and captures on a machine without them, as torch.cuda.graph leaves them: where ending a capture
    raises, its stream stays the current one."""

    def __init__(self) -> None:
        self.current = self.default = SimpleNamespace(device="cuda:1")
        self.options: dict[str, object] = {}

    @contextmanager
    def stream(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: object, *, stream: SimpleNamespace, **options: object) -> Iterator[None]:
        self.options = options
        before, self.current = self.current, stream
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error
        self.current = before


def test_a_capture_that_fails_does_not_leave_its_stream_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams()
    for name, value in {
        "Stream": lambda device: SimpleNamespace(device=device), "graph_pool_handle": lambda: (0, 1),
        "CUDAGraph": lambda keep_graph: object(), "current_stream": lambda device: streams.current, "stream": streams.stream,
        "graph": streams.graph,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    recorder = CudaRecorder(torch.device("cuda:1"))
    inside: list[object] = []
    recorder.capture(lambda: inside.append(streams.current))
    assert inside == [recorder._stream]
    assert streams.options == {"pool": (0, 1), "capture_error_mode": "thread_local"}

    def broken() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="during capture"):
        recorder.capture(broken)
    assert streams.current is streams.default
