"""Whole refinements by the shipped refiner, and the server beside the engine in one's own program."""

import asyncio
from pathlib import Path
from typing import Any

import torch

from bench.baselines import greedy_generate
from bench.bench_refine import Subject, read_drafts
from bench.suite.case import Case, Operation, Shape
from engine import AsyncRefiner, RefineOptions
from engine.refiner import DEFAULT_CHECKPOINT

DRAFTS = Path(__file__).parents[1] / "demo" / "drafts.jsonl"


def of_refinement(shape: Shape, dtype: torch.dtype) -> Case:
    """Requests at once, longest answer in tokens. All find the same greedy answers, transformers' generate too."""
    batch, longest = shape
    subject = Subject(DEFAULT_CHECKPOINT)
    rows = subject.ids(read_drafts(DRAFTS, batch), None)
    prompts = [row["prompt_ids"] for row in rows]

    def generate(**cache: Any) -> list[list[int]]:
        return greedy_generate(subject.theirs, prompts, longest, subject.vocabulary.pad, **cache)

    def refine(requests: list[dict[str, Any]], **options: Any) -> list[list[int]]:
        found = subject.refiner.refine(requests, RefineOptions(max_new_tokens=longest, **options))
        return [result.token_ids for result in found]

    none: list[dict[str, Any]] = [{"prompt_ids": prompt} for prompt in prompts]
    right = [
        {"prompt_ids": row["prompt_ids"], "draft_ids": answer} for row, answer in zip(rows, generate(), strict=True)
    ]
    calls = {
        "engine": lambda: refine(rows),
        "right draft": lambda: refine(right),
        "no draft": lambda: refine(none),
        "token by token": lambda: refine(none, window=1, realign=False),
        "generate": generate,
        "generate, static cache": lambda: generate(cache_implementation="static"),
    }
    return Case(calls, close=subject.refiner.close)


def of_server(shape: Shape, dtype: torch.dtype) -> Case:
    """Requests at once, longest answer. The application is called in this process: what HTTP itself takes, such as parsing
    and sockets, is in bench.bench_serve."""
    import httpx2

    from engine.server import create_app

    clients, longest = shape
    rows = read_drafts(DRAFTS, clients)
    options = RefineOptions(max_new_tokens=longest)
    loop = asyncio.new_event_loop()
    refiner = AsyncRefiner.from_pretrained()
    transport = httpx2.ASGITransport(app=create_app(refiner))
    client = httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=600)

    async def ask(row: dict[str, Any]) -> list[int]:
        answer = await client.post("/v1/refine", json={**row, "options": {"max_new_tokens": longest}})
        return list(answer.raise_for_status().json()["token_ids"])

    async def alone(row: dict[str, Any]) -> list[int]:
        return (await refiner.refine(row, options)).token_ids

    async def all_rows(one: Any) -> list[list[int]]:
        return await asyncio.gather(*(one(row) for row in rows))

    async def end() -> None:
        await client.aclose()
        await refiner.close()

    def close() -> None:
        loop.run_until_complete(end())
        loop.close()

    calls = {
        name: lambda one=one: loop.run_until_complete(all_rows(one))
        for name, one in (("engine", ask), ("no server", alone))
    }
    return Case(calls, close=close)


OPERATIONS = {
    "refine": Operation(
        of_refinement,
        ("engine", "right draft", "no draft", "token by token", "generate", "generate, static cache"),
        {"tiny": ((2, 8),), "quick": ((1, 64), (8, 64)), "full": ((1, 256), (16, 256))},
    ),
    "server": Operation(
        of_server, ("engine", "no server"), {"tiny": ((2, 8),), "quick": ((16, 32),), "full": ((64, 128),)}
    ),
}
"""``refine``'s engine is given the demo's drafts, which are none of its own answers."""
