"""When a step is warmed up, captured and replayed, with graphs that only count."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from engine.errors import failures
from engine.step_runner import Counts, EagerRunner, GraphRunner, StepKind


class Recorder:
    """Writes down what happens; a graph replays by running the step it was made of."""

    def __init__(self, refuses: tuple[int, ...] = (), error: Exception | None = None) -> None:
        self.log: list[str] = []
        self.refuses = refuses
        self.error = error or RuntimeError("operation not permitted when stream is capturing")
        self.capturing = False

    def step(self, kind: StepKind) -> None:
        if self.capturing and kind.rows in self.refuses:
            raise self.error
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


def test_the_first_step_is_captured_behind_its_run_and_all_others_replay() -> None:
    recorder = Recorder()
    runner = GraphRunner(recorder.step, recorder)
    for rows in (16, 16, 32, 16, 32):
        runner.launch(StepKind(rows))
    first = ["side", "run {}", "back", "capture {}"]
    expected = zip((first, ["replay"], first, ["replay"], ["replay"]), (16, 16, 32, 16, 32), strict=True)
    assert recorder.log == [line.format(rows) for part, rows in expected for line in part]
    assert runner.counts == Counts(captured=2, failed=0, replayed=3)


def test_steps_that_sample_have_graphs_of_their_own() -> None:
    recorder = Recorder()
    runner = GraphRunner(recorder.step, recorder)
    for sampled in (False, False, True, False, True):
        runner.launch(StepKind(16, sampled))
    ran = [line for line in recorder.log if line not in ("side", "back")]
    sampled_one = ["run 16 sampled", "capture 16 sampled"]
    assert ran == ["run 16", "capture 16", "replay", *sampled_one, "replay", "replay"]


def test_every_launch_runs_the_step_once() -> None:
    """Capturing does not run it, so a state that it moves is moved once per launch."""
    recorder = Recorder(refuses=(32,))
    runner = GraphRunner(recorder.step, recorder)
    for launches in range(1, 6):
        for rows in (16, 32):
            runner.launch(StepKind(rows))
        assert sum(line.startswith(("run", "replay")) for line in recorder.log) == 2 * launches


def test_after_a_capture_that_fails_there_is_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """It is said once; graphs that there are go on."""
    recorder = Recorder(refuses=(32,))
    runner = GraphRunner(recorder.step, recorder)
    for rows in (16, 32, 64):
        runner.launch(StepKind(rows))
    recorder.log.clear()
    for rows in (16, 32, 64):
        runner.launch(StepKind(rows))
    assert recorder.log == ["replay", "side", "run 32", "back", "side", "run 64", "back"]
    assert runner.counts == Counts(captured=1, failed=1, replayed=1)
    assert [record.message for record in caplog.records] == [
        "a step of 32 rows cannot be captured as a CUDA graph; steps without a graph are launched operation by operation "
        "from now on: operation not permitted when stream is capturing"
    ]


def test_a_kernel_that_triton_cannot_launch_costs_the_graph_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its errors are no RuntimeError; here they are those of a Triton that is none."""

    class OutOfResources(Exception):
        pass

    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(TritonError=OutOfResources))
    recorder = Recorder(refuses=(32,), error=OutOfResources("out of resource: shared memory"))
    runner = GraphRunner(recorder.step, recorder)
    for _ in range(2):
        runner.launch(StepKind(32))
    assert recorder.log == ["side", "run 32", "back"] * 2
    assert runner.counts == Counts(captured=0, failed=1, replayed=0)


def test_asking_for_tritons_errors_does_not_import_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert failures() == (RuntimeError, MemoryError)
    assert "triton" not in sys.modules


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
    for rows in (16, 16, 32):
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
