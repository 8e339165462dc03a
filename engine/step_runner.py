"""How a step of the device loop is launched: operation by operation, or as a CUDA graph that was captured once."""

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from engine.errors import failures

logger = logging.getLogger("engine.step_runner")

_CAPTURING = threading.Lock()
"""Held while a step is captured: PyTorch allows one capture at a time in a process."""


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
        # Not torch.cuda.graph: it waits for the whole device, which spoils a capture of anyone else's, and empties the cache
        # of everyone in the process. Neither is needed, as the stream orders what was launched before.
        with _CAPTURING, torch.cuda.stream(self._stream):
            try:
                return self._captured(step)
            except torch.OutOfMemoryError:
                # while capturing, the allocator frees nothing of what it keeps for others
                torch.cuda.empty_cache()
                return self._captured(step)

    def _captured(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph(keep_graph=self._keep_graph)
        try:
            # Another thread may be using the GPU: in this mode its allocations do no harm. A wait for the whole device would,
            # in any mode.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            step()
            graph.capture_end()
        except BaseException:
            self._abandon(graph)
            raise
        return graph

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends what a failed capture began: the stream's state, then what the allocator gives to the pool.

        Each part may have ended already, or have nothing to end. The allocator is told a second time because capture_end of
        older PyTorch (before pull request 180395) does not get to it where the stream's capture was spoilt, and every later
        torch.cuda.empty_cache() in the process would raise. What the pool holds by then may stay reserved all the same.
        """
        with suppress(RuntimeError):
            graph.capture_end()
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
        with suppress(RuntimeError):
            graph.reset()


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


@dataclass(slots=True)
class Counts:
    """Of graphs, since the runner was made."""

    captured: int = 0
    failed: int = 0
    replayed: int = 0


class GraphRunner:
    """One graph per kind of step. Not run on a GPU yet: its bookkeeping is tested with graphs that are none.

    The first step of a kind runs as it is on the side stream, where kernels are compiled and libraries allocate. It is
    captured right behind that, in the same thread, as libraries keep handles per thread; from then on it is replayed.
    After a capture that failed no other is tried: steps that have no graph run as the first ones do.
    """

    def __init__(self, step: Callable[[StepKind], None], recorder: Recorder) -> None:
        self._step, self._recorder = step, recorder
        self._graphs: dict[StepKind, Graph] = {}
        self.counts = Counts()

    def launch(self, kind: StepKind) -> None:
        if graph := self._graphs.get(kind):
            graph.replay()
            self.counts.replayed += 1
            return
        with self._recorder.side_stream():
            self._step(kind)
        if not self.counts.failed:
            self._capture(kind)

    def close(self) -> None:
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    def _capture(self, kind: StepKind) -> None:
        try:
            self._graphs[kind] = self._recorder.capture(lambda: self._step(kind))
            self.counts.captured += 1
        except failures() as error:
            self.counts.failed += 1
            what = "sampled rows" if kind.sampled else "rows"
            logger.warning(
                "a step of %d %s cannot be captured as a CUDA graph; steps without a graph are launched operation by operation "
                "from now on: %s", kind.rows, what, error,
            )  # fmt: skip
