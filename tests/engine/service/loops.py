"""Event loops for tests of AsyncRefiner, and models whose passes can be held back."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from torch import Tensor

from engine import AsyncRefiner
from engine.batch import StepBatch
from engine.kv_cache import KVCache
from tests.engine.service.helpers import Fragile, make_refiner

T = TypeVar("T")


def run(test: Coroutine[Any, Any, T]) -> T:
    """Every test ends, or fails, within two minutes."""

    async def limited() -> T:
        return await asyncio.wait_for(test, 120)

    return asyncio.run(limited())


class Gate:
    """Holds a model's passes back until they are let through."""

    def __init__(self, model: Any) -> None:
        self.passes = 0
        """That have begun; the last one may be held back."""
        self._turnstile = threading.Semaphore(0)
        self._forward = model.forward
        model.forward = self._pass

    def _pass(self, batch: StepBatch, cache: KVCache) -> Tensor:
        self.passes += 1
        assert self._turnstile.acquire(timeout=60)
        hidden: Tensor = self._forward(batch, cache)
        return hidden

    def open(self, passes: int = 100_000) -> None:
        self._turnstile.release(passes)


@contextmanager
def held_back(model: Any) -> Iterator[Gate]:
    """A Gate in front of a model that others use afterwards."""
    gate = Gate(model)
    try:
        yield gate
    finally:
        gate.open()
        del model.forward


@asynccontextmanager
async def fragile(**limits: Any) -> AsyncIterator[tuple[AsyncRefiner, Fragile]]:
    model = Fragile()
    queue = {name: limits.pop(name) for name in ("max_queue_requests", "metrics") if name in limits}
    async with AsyncRefiner(make_refiner(model, **limits), **queue) as refiner:
        yield refiner, model


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(20_000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("did not come about")
