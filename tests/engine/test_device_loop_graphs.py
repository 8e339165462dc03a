"""The device loop with graphs, on a CPU: its steps find what steps in a CUDA graph find, and no more."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.device_loop import DeviceLoop
from engine.scheduler import Scheduler
from engine.step_runner import GraphRunner, StepKind, StepRunner
from tests.engine.test_device_loop import OPTIONS, TOKENS, make, outcome, run, start

POISON = -(2**30)


class Graphs:
    """A Recorder. What is captured does not run; a replay runs it, if every tensor is where it was at the capture.

    Packed rows and their noise are poisoned first, and again behind the step: it must write them, and nobody may keep them.
    """

    def __init__(self) -> None:
        self.loop: DeviceLoop | None = None
        self.replays = 0

    def runner(self, step: Callable[[StepKind], None]) -> StepRunner:
        return GraphRunner(step, self)

    def side_stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def capture(self, step: Callable[[], None]) -> "Graph":
        return Graph(self, step)

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Those of the state, and those that are a step's own."""
        assert self.loop is not None
        state, own = [self.loop._eos], []
        state += [getattr(self.loop.state, name) for name in self.loop.state.__slots__]
        for rows in (self.loop._rows, self.loop._noise):
            own += [getattr(rows, name) for name in rows.__slots__]
        return state, own


class Graph:
    def __init__(self, graphs: Graphs, step: Callable[[], None]) -> None:
        self.graphs, self.step = graphs, step
        self.addresses = self._addresses()

    def replay(self) -> None:
        assert self.addresses == self._addresses()
        self.graphs.replays += 1
        self._poison()
        self.step()
        self._poison()

    def reset(self) -> None:
        self.addresses = []

    def _addresses(self) -> list[int]:
        state, own = self.graphs.tensors()
        return [tensor.data_ptr() for tensor in (*state, *own)]

    def _poison(self) -> None:
        for tensor in self.graphs.tensors()[1]:
            tensor.fill_(POISON)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(TOKENS.filter(bool), TOKENS, OPTIONS, st.booleans()), min_size=2, max_size=8),
    st.sampled_from([(512, 4), (20, 3)]),
)
def test_answers_are_those_of_the_host(
    cases: list[tuple[list[int], list[int], dict[str, Any], bool]], limits: tuple[int, int]
) -> None:
    assert_as_on_the_host(with_graphs(Graphs(), *limits), cases)


def test_most_steps_are_replayed() -> None:
    """One kind of step after another is warmed up; no graph is used once the loop is closed."""
    graphs = Graphs()
    scheduler = with_graphs(graphs, 512, 4)
    greedy = [start([5, 10 + i], [], max_new_tokens=30, window=3) for i in range(3)]
    sampled = start([5, 10], [], max_new_tokens=30, window=3, temperature=0.5)
    run(scheduler, greedy)
    before = graphs.replays
    assert before >= max(s.steps for s in greedy) - 2  # one with four slots, one with the last sequence's
    run(scheduler, [sampled])
    assert graphs.replays - before >= sampled.steps - 1
    scheduler.close()
    after = graphs.replays
    run(scheduler, [start([5, 10], [], max_new_tokens=1)])
    assert graphs.replays == after


def with_graphs(graphs: Graphs, max_batch_tokens: int, max_batch_size: int) -> Scheduler:
    scheduler = make(True, max_batch_tokens=max_batch_tokens, max_batch_size=max_batch_size)
    assert scheduler.loop is not None
    graphs.loop = scheduler.loop
    graphs.loop._runner = graphs.runner(graphs.loop._step)
    return scheduler


def assert_as_on_the_host(scheduler: Scheduler, cases: list[tuple[list[int], list[int], dict[str, Any], bool]]) -> None:
    """``cases``: prompt, draft, options, and whether it is observed. All together they get what each gets alone there."""
    alone = [start(p, d, **o) for p, d, o, _ in cases]
    for sequence in alone:
        if not sequence.finish_reason:
            run(make(False), [sequence])
    together = [start(p, d, **o) for p, d, o, _ in cases]
    for sequence, (_, _, _, observed) in zip(together, cases, strict=True):
        sequence.observed = observed
    run(scheduler, together)
    assert [outcome(s) for s in together] == [outcome(s) for s in alone]
