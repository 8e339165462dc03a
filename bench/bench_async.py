"""An AsyncRefiner under more requests than it can serve: what is answered, what is shed, and how long either takes.

python -m bench.bench_async [--seconds S] [--clients N] [--loads 0.5,1,3] [--scratch FOLDER] [--name async]

First as many requests as the clients can wait for, which gives the capacity; then, for every load, requests at random times
(a Poisson process) at that multiple of it, whether earlier ones are answered or not. A tiny random Llama; clients, load
generator and engine share one process, so the figures are those of the whole. Every answer is compared with the synchronous
engine's. Writes bench/results/async.json.
"""

import argparse
import asyncio
import gc
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.measure import machine, save
from engine import AsyncRefiner, QueueFull, RefineOptions, Refiner
from tests.engine.checkpoints import VOCABULARY, build

OPTIONS = RefineOptions(max_new_tokens=48)
LIMITS = {"kv_cache_tokens": 16_384, "max_batch_size": 32}
QUEUE = 128
DISTINCT = 200
"""Different requests; every one is asked many times."""


@dataclass
class Tally:
    """What became of the requests of one load; seconds."""

    sent: int = 0
    answered: list[float] = field(default_factory=list)
    shed: list[float] = field(default_factory=list)
    hints: list[float] = field(default_factory=list)
    wrong: int = 0
    others: Counter[str] = field(default_factory=Counter)
    resident: list[float] = field(default_factory=list)

    def report(self, seconds: float) -> dict[str, Any]:
        ended = len(self.answered) + len(self.shed) + sum(self.others.values())
        return {
            "seconds": round(seconds, 2), "sent": self.sent, "answered": len(self.answered), "shed": len(self.shed),
            "lost": self.sent - ended, "wrong answers": self.wrong, "other errors": dict(self.others),
            "answers/s": round(len(self.answered) / seconds, 1), "latency ms": percentiles(self.answered),
            "shed told after ms": percentiles(self.shed),
            "retry hint s": percentiles(self.hints, 1.0),
            "MiB resident": [round(value, 1) for value in self.resident],
        }  # fmt: skip


def percentiles(values: list[float], unit: float = 1000.0) -> dict[str, float] | None:
    if len(values) < 2:
        return None
    cuts = statistics.quantiles(values, n=100)
    return {"p50": round(cuts[49] * unit, 3), "p99": round(cuts[98] * unit, 3), "max": round(max(values) * unit, 3)}


def resident() -> float:
    """MiB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Subject:
    """The requests, the right answers and the refiner under load."""

    def __init__(self, folder: Path) -> None:
        draw = random.Random(0)
        ids = range(4, VOCABULARY)
        self.requests = [
            {
                "prompt_ids": draw.choices(ids, k=draw.randint(1, 100)),
                "draft_ids": draw.choices(ids, k=draw.randint(0, 60)),
            }
            for _ in range(DISTINCT)
        ]
        with Refiner.from_pretrained(folder, **LIMITS) as refiner:
            self.answers = [result.token_ids for result in refiner.refine(self.requests, OPTIONS)]
        self.refiner = AsyncRefiner.from_pretrained(folder, max_queue_requests=QUEUE, **LIMITS)
        self.draw = random.Random(1)

    async def ask(self, tally: Tally) -> None:
        """One request to its end, whichever that is."""
        which = self.draw.randrange(DISTINCT)
        identity = tally.sent
        tally.sent += 1
        before = time.perf_counter()
        try:
            result = await self.refiner.refine({**self.requests[which], "id": identity}, OPTIONS)
        except QueueFull as error:
            tally.shed.append(time.perf_counter() - before)
            tally.hints.append(error.retry_after)
        except Exception as error:
            tally.others[type(error).__name__] += 1
        else:
            tally.answered.append(time.perf_counter() - before)
            tally.wrong += result.id != identity or result.token_ids != self.answers[which]

    async def closed_loop(self, clients: int, seconds: float) -> Tally:
        """Every client asks again as soon as it has its answer."""
        tally, end = Tally(), time.perf_counter() + seconds

        async def client() -> None:
            while time.perf_counter() < end:
                await self.ask(tally)

        await asyncio.gather(*(client() for _ in range(clients)))
        return tally

    async def open_loop(self, clients: int, rate: float, seconds: float) -> Tally:
        """``rate`` requests per second in all, whatever becomes of them."""
        tally, end = Tally(), time.perf_counter() + seconds
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
                tally.resident.append(resident())
                await asyncio.sleep(seconds / 8)

        await asyncio.gather(watch(), *(client() for _ in range(clients)))
        await asyncio.gather(*open_tasks)
        return tally


async def measure(folder: Path, clients: int, seconds: float, loads: list[float]) -> dict[str, Any]:
    subject = Subject(folder)
    async with subject.refiner:
        await subject.closed_loop(clients, seconds / 5)  # warm-up
        start = time.perf_counter()
        tally = await subject.closed_loop(clients, seconds)
        closed = tally.report(time.perf_counter() - start)
        capacity = closed["answers/s"]
        print("closed loop:", closed, flush=True)
        out: dict[str, Any] = {"closed loop": closed}
        for load in loads:
            start = time.perf_counter()
            tally = await subject.open_loop(clients, load * capacity, seconds)
            out[f"load {load:g}"] = tally.report(time.perf_counter() - start)
            print(f"load {load:g}:", out[f"load {load:g}"], flush=True)
        subject.refiner._refiner.check_integrity()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of every part")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--loads", default="0.5,1,3", help="multiples of the capacity, separated by commas")
    parser.add_argument("--threads", type=int, default=1, help="of the kernels")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "diffpo-bench")
    parser.add_argument("--name", default="async", help="file name under bench/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.scratch / "tiny-llama"
    folder.mkdir(parents=True, exist_ok=True)
    build("llama", folder)
    settings = {"clients": args.clients, "queue": QUEUE, **LIMITS, "max_new_tokens": OPTIONS.max_new_tokens}
    loads = [float(load) for load in args.loads.split(",")]
    results = asyncio.run(measure(folder, args.clients, args.seconds, loads))
    print(save(args.name, {"machine": machine(), "settings": settings, **results}))


if __name__ == "__main__":
    main()
