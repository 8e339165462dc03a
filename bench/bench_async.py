"""An AsyncRefiner under more requests than it can serve: what is answered, what is shed, and how long either takes.

python -m bench.bench_async [--seconds S] [--clients N] [--loads 0.5,1,3] [--scratch FOLDER] [--name async]

First as many requests as the clients can wait for, which gives the capacity; then, for every load, requests at random times
(a Poisson process) at that multiple of it, whether earlier ones are answered or not. A tiny random Llama; clients, load
generator and engine share one process, so the figures are those of the whole. Every answer is compared with the synchronous
engine's. Writes bench/results/async.json.
"""

import argparse
import asyncio
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.load import LIMITS, QUEUE, Shed, Subject
from bench.measure import machine, save
from engine import AsyncRefiner, QueueFull, RefineOptions
from tests.engine.checkpoints import VOCABULARY, build

OPTIONS = RefineOptions(max_new_tokens=48)
DISTINCT = 200


class InProcess(Subject):
    """An AsyncRefiner of this process."""

    def __init__(self, folder: Path, requests: list[dict[str, Any]], options: RefineOptions) -> None:
        super().__init__(folder, requests, options)
        self.refiner = AsyncRefiner.from_pretrained(folder, max_queue_requests=QUEUE, **LIMITS)

    @property
    def process(self) -> int:
        return os.getpid()

    async def answer(self, request: dict[str, Any]) -> tuple[Any, list[int]]:
        try:
            result = await self.refiner.refine(request, self.options)
        except QueueFull as error:
            raise Shed(error.retry_after) from None
        return result.id, result.token_ids


def random_requests() -> list[dict[str, Any]]:
    draw, ids = random.Random(0), range(4, VOCABULARY)
    return [
        {"prompt_ids": draw.choices(ids, k=draw.randint(1, 100)), "draft_ids": draw.choices(ids, k=draw.randint(0, 60))}
        for _ in range(DISTINCT)
    ]


async def measure(folder: Path, clients: int, seconds: float, loads: list[float]) -> dict[str, Any]:
    subject = InProcess(folder, random_requests(), OPTIONS)
    async with subject.refiner:
        out = await subject.under(clients, seconds, loads)
        subject.refiner._refiner.check_integrity()
    return out


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """Options of this benchmark and of the server's."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of every part")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--loads", default="0.5,1,3", help="multiples of the capacity, separated by commas")
    parser.add_argument("--threads", type=int, default=1, help="of the kernels")
    parser.add_argument("--name", default=name, help="file name under bench/results/")
    return parser


def about(args: argparse.Namespace, options: RefineOptions) -> dict[str, Any]:
    """What a reader of the results needs to know."""
    settings = {"clients": args.clients, "queue": QUEUE, **LIMITS, "max_new_tokens": options.max_new_tokens}
    return {"machine": machine(), "settings": settings}


def main() -> None:
    options = parser(__doc__, "async")
    options.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "diffpo-bench")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    folder: Path = args.scratch / "tiny-llama"
    folder.mkdir(parents=True, exist_ok=True)
    build("llama", folder)
    loads = [float(load) for load in args.loads.split(",")]
    results = about(args, OPTIONS) | asyncio.run(measure(folder, args.clients, args.seconds, loads))
    print(save(args.name, results))


if __name__ == "__main__":
    main()
