"""torch.cuda's streams, events and captures on a machine without them: they do nothing but write down what they are told."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

POOL = (0, 1)


class Cuda:
    """What torch.cuda has, as far as the engine uses it. Each thread has a current stream, "main" at first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.underway: list[object] = []
        """Pools that the allocator believes to be captured into."""
        self.spoilt = False
        """Whether ending a capture fails."""
        self.tells_allocator = True
        """Whether it tells the allocator all the same; older PyTorch does not."""
        self._thread = threading.local()
        self._sides = 0
        for name in ("Stream", "Event", "CUDAGraph", "current_stream", "stream", "graph_pool_handle", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("synchronize", "graph"):
            monkeypatch.setattr(torch.cuda, name, self._forbidden)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._end_pool, raising=False)

    @property
    def current(self) -> str:
        """The current stream's name."""
        return getattr(self._thread, "current", "main")

    def taken(self) -> list[str]:
        """What was written down since the last call."""
        log, self.log = self.log, []
        return log

    def Stream(self, device: object = None) -> "Stream":
        self._sides += 1
        return Stream("side" if self._sides == 1 else f"side {self._sides}", self)

    def Event(self) -> "Event":
        return Event(self)

    def CUDAGraph(self, keep_graph: bool = False) -> "Graph":
        return Graph(self)

    def current_stream(self, device: object = None) -> "Stream":
        return Stream(self.current, self)

    @contextmanager
    def stream(self, stream: "Stream") -> Iterator[None]:
        before, self._thread.current = self.current, stream.name
        try:
            yield
        finally:
            self._thread.current = before

    def graph_pool_handle(self) -> tuple[int, int]:
        return POOL

    def empty_cache(self) -> None:
        assert not self.underway, "captures_underway.empty() INTERNAL ASSERT FAILED"
        self.log.append("empty cache")

    def _forbidden(self, *given: object, **options: object) -> Any:
        raise AssertionError("this waits for the whole device")

    def _end_pool(self, device: int, pool: object) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)
        self.log.append("end pool")


@dataclass(frozen=True)
class Stream:
    """A new object each time it is asked for, as in PyTorch; equal by what it stands for."""

    name: str
    cuda: Cuda
    device: str = "cuda:1"
    device_index: int = 1

    def wait_stream(self, other: "Stream") -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.cuda.log.append(f"host waits for {self.name}")


class Event:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.done = False

    def record(self, stream: Stream) -> None:
        self.cuda.log.append(f"event on {stream.name}")

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.cuda.log.append("host waits for the event")
        self.done = True


class Graph:
    """One capture at a time, as CUDAGraph in PyTorch."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def capture_begin(self, *, pool: object, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        assert not self.cuda.underway, "only one capture may be underway"
        self.cuda.underway.append(pool)
        self.cuda.log.append(f"begin on {self.cuda.current}")

    def capture_end(self) -> None:
        self.cuda.log.append(f"end on {self.cuda.current}")
        if self.cuda.tells_allocator or not self.cuda.spoilt:
            self.cuda.underway.clear()
        if self.cuda.spoilt:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        self.cuda.log.append(f"replay on {self.cuda.current}")

    def reset(self) -> None:
        self.cuda.log.append("reset")


def logged(cuda: Cuda, what: str = "step") -> Callable[..., None]:
    """Work that writes down on which stream it was launched."""
    return lambda *given: cuda.log.append(f"{what} on {cuda.current}")
