"""How a step of the device loop is launched: operation by operation, or as a CUDA graph that was captured once."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch

logger = logging.getLogger("engine.step_runner")


class StepKind(NamedTuple):
    """What decides which operations a step consists of."""

    rows: int
    """Packed rows."""
    sampled: bool = False
    """Whether predictions are drawn with noise; a step that has none does no work for it."""
    slots: int = 1
    """Of the loop, from the first on; those behind are empty."""


class StepRunner(Protocol):
    """Runs steps of given kinds; what they work on stays at the same addresses."""

    def launch(self, kind: StepKind) -> None:
        """Starts a step and does not wait for it."""

    def close(self) -> None:
        """Frees what launching needs."""


class EagerRunner:
    """Runs the step's operations one by one, on any device."""

    def __init__(self, step: Callable[[StepKind], None]) -> None:
        self._step = step

    def launch(self, kind: StepKind) -> None:
        self._step(kind)

    def close(self) -> None:
        pass


class Graph(Protocol):
    """A captured step; torch.cuda.CUDAGraph is one."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


class Recorder(Protocol):
    """Where a step is warmed up and captured."""

    def side_stream(self) -> AbstractContextManager[None]:
        """The context to warm up in."""

    def capture(self, step: Callable[[], None]) -> Graph:
        """The graph of what ``step`` launches, which does not run now."""


class CudaRecorder:
    """Warms up and captures on one stream, so that libraries find the workspaces they made, into one memory pool.

    All graphs may share it: a step leaves nothing behind but in tensors that are not the pool's, and no two run at once.
    """

    def __init__(self, device: torch.device, *, keep_graph: bool = False) -> None:
        """``keep_graph``: captured graphs can be made a part of others."""
        self._stream, self._keep_graph = torch.cuda.Stream(device), keep_graph
        self._pool = torch.cuda.graph_pool_handle()

    def side_stream(self) -> "_SideStream":
        return _SideStream(self._stream)

    def capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph(keep_graph=self._keep_graph)
        # A capture that fails leaves its stream the current one: what comes next would go there, behind nothing. The outer
        # context also makes the device the current one, which is the one that torch.cuda.graph waits for.
        current = torch.cuda.stream(torch.cuda.current_stream(self._stream.device))
        # Only this thread's calls can spoil the capture: another may be using the GPU in the same process.
        recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with current, recording:
            step()
        return graph


class _SideStream:
    """Work inside comes after what the current stream holds and before what it gets."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._context = torch.cuda.stream(stream)

    def __enter__(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._context.__enter__()

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class GraphRunner:
    """One graph per kind of step. Not run on a GPU yet: its bookkeeping is tested with graphs that are none.

    The first step of a kind runs as it is on the side stream, where kernels are compiled and libraries allocate; the second
    is captured, and from then on replayed. A kind whose capture fails goes on as its first step did.
    """

    def __init__(self, step: Callable[[StepKind], None], recorder: Recorder) -> None:
        self._step, self._recorder = step, recorder
        self._warm: set[StepKind] = set()
        self._graphs: dict[StepKind, Graph] = {}
        self._failed: set[StepKind] = set()

    def launch(self, kind: StepKind) -> None:
        if kind in self._warm and kind not in self._graphs and kind not in self._failed:
            self._capture(kind)
        if graph := self._graphs.get(kind):
            graph.replay()
            return
        with self._recorder.side_stream():
            self._step(kind)
        self._warm.add(kind)

    def close(self) -> None:
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._warm.clear()

    def _capture(self, kind: StepKind) -> None:
        try:
            self._graphs[kind] = self._recorder.capture(lambda: self._step(kind))
        except RuntimeError as error:
            self._failed.add(kind)
            what = "sampled rows" if kind.sampled else "rows"
            logger.warning(
                "a step of %d %s cannot be captured as a CUDA graph and runs without: %s", kind.rows, what, error
            )
