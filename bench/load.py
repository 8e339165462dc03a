"""Requests by the thousand: clients that wait for their answers, or arrivals at random times that wait for nothing."""

import asyncio
import gc
import os
import random
import statistics
import time
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import RefineOptions, Refiner

LIMITS = {"kv_cache_tokens": 16_384, "max_batch_size": 32}
QUEUE = 128
LONGEST = 120.0
"""Seconds after which a request without any answer is lost."""


class Shed(Exception):
    """The subject had no room for a request."""

    def __init__(self, retry_after: float) -> None:
        self.retry_after = retry_after


@dataclass
class Tally:
    """What became of the requests of one load; seconds."""

    sent: int = 0
    lost: int = 0
    answered: list[float] = field(default_factory=list)
    shed: list[float] = field(default_factory=list)
    hints: list[float] = field(default_factory=list)
    wrong: int = 0
    others: Counter[str] = field(default_factory=Counter)
    resident: list[float] = field(default_factory=list)

    def report(self, seconds: float) -> dict[str, Any]:
        ended = len(self.answered) + len(self.shed) + sum(self.others.values()) + self.lost
        return {
            "seconds": round(seconds, 2), "sent": self.sent, "answered": len(self.answered), "shed": len(self.shed),
            "lost": self.lost + self.sent - ended, "wrong answers": self.wrong, "other errors": dict(self.others),
            "answers/s": round(len(self.answered) / seconds, 1), "latency ms": percentiles(self.answered),
            "shed told after ms": percentiles(self.shed),
            "retry hint s": percentiles(self.hints, 1.0),
            "MiB resident": [round(value, 1) for value in self.resident],
        }  # fmt: skip


def percentiles(values: list[float], unit: float = 1000.0) -> dict[str, float] | None:
    if len(values) < 2:
        return None
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49] * unit, 3), "p99": round(cuts[98] * unit, 3), "max": round(max(values) * unit, 3)}


def resident(process: int) -> float:
    """MiB of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Subject(ABC):
    """Something that answers requests; the right answers are the synchronous engine's."""

    def __init__(self, folder: Path, requests: list[dict[str, Any]], options: RefineOptions) -> None:
        """Every one of ``requests`` is asked many times."""
        self.requests = requests
        self.options = options
        with Refiner.from_pretrained(folder, **LIMITS) as refiner:
            self.answers = [result.token_ids for result in refiner.refine(requests, options)]
        self.draw = random.Random(1)
        self.counted: Counter[str] = Counter()

    @property
    @abstractmethod
    def process(self) -> int:
        """Where the engine runs."""

    @abstractmethod
    async def answer(self, request: dict[str, Any]) -> tuple[Any, list[int]]:
        """The answer's id and tokens. Raises Shed."""

    async def ask(self, tally: Tally) -> None:
        """One request to its end, whichever that is."""
        which = self.draw.randrange(len(self.requests))
        identity = tally.sent
        tally.sent += 1
        before = time.perf_counter()
        try:
            of, tokens = await asyncio.wait_for(self.answer({**self.requests[which], "id": identity}), LONGEST)
        except asyncio.TimeoutError:
            tally.lost += 1
        except Shed as error:
            self.counted["refused"] += 1
            tally.shed.append(time.perf_counter() - before)
            tally.hints.append(error.retry_after)
        except Exception as error:
            tally.others[type(error).__name__] += 1
        else:
            self.counted["answered"] += 1
            tally.answered.append(time.perf_counter() - before)
            tally.wrong += of != identity or tokens != self.answers[which]

    async def closed_loop(self, clients: int, seconds: float) -> dict[str, Any]:
        """Every client asks again as soon as it has its answer."""
        tally, start = Tally(), time.perf_counter()

        async def client() -> None:
            while time.perf_counter() < start + seconds:
                await self.ask(tally)

        await asyncio.gather(*(client() for _ in range(clients)))
        return tally.report(time.perf_counter() - start)

    async def open_loop(self, clients: int, rate: float, seconds: float) -> dict[str, Any]:
        """``rate`` requests per second in all, whatever becomes of them."""
        tally, start = Tally(), time.perf_counter()
        end = start + seconds
        open_tasks: set[asyncio.Task[None]] = set()

        async def client() -> None:
            due = time.perf_counter()
            while (due := due + self.draw.expovariate(rate / clients)) < end:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                task = asyncio.create_task(self.ask(tally))
                open_tasks.add(task)
                task.add_done_callback(open_tasks.discard)

        async def watch() -> None:
            while time.perf_counter() < end:
                gc.collect()
                tally.resident.append(resident(self.process))
                await asyncio.sleep(seconds / 8)

        await asyncio.gather(watch(), *(client() for _ in range(clients)))
        await asyncio.gather(*open_tasks)
        return tally.report(time.perf_counter() - start)

    async def under(self, clients: int, seconds: float, loads: list[float]) -> dict[str, Any]:
        """A closed loop for the capacity, then every load as a multiple of it."""
        await self.closed_loop(clients, seconds / 5)  # warm-up
        closed = await self.closed_loop(clients, seconds)
        print("closed loop:", closed, flush=True)
        out: dict[str, Any] = {"closed loop": closed}
        for load in loads:
            out[f"load {load:g}"] = await self.open_loop(clients, load * closed["answers/s"], seconds)
            print(f"load {load:g}:", out[f"load {load:g}"], flush=True)
        return out
