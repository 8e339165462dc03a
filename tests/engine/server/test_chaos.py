"""Everything at once over HTTP: clients that leave, deadlines, bad bodies, poisoned requests, failures of the model.

After every round nothing runs, every page is free, and whoever asked for something sound and stayed has the right answer.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import httpx2 as httpx
import pytest
import torch

from engine import AsyncRefiner
from engine.server import Settings, create_app
from tests.engine.server.servers import idle, running, wait_until
from tests.engine.service.helpers import NAN, POISON, Fragile, answer, make_refiner

ROUNDS = 25
FAILURES = (MemoryError, torch.OutOfMemoryError, lambda: RuntimeError("the kernel failed"))


class Client:
    """What may happen to a request; each way counts how it ended."""

    def __init__(self, http: httpx.AsyncClient, draw: random.Random) -> None:
        self.http, self.draw = http, draw
        self.ended: Counter[str] = Counter()

    @property
    def ways(self) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        return [
            self.stays, self.stays, self.watches, self.leaves, self.leaves_a_stream, self.is_late, self.is_poisoned, self.is_bad
        ]  # fmt: skip

    def sound(self) -> tuple[dict[str, Any], list[int]]:
        prompt, limit = [self.draw.randrange(2, 18) for _ in range(2)], self.draw.randint(1, 60)
        draft = [self.draw.randrange(2, 18) for _ in range(self.draw.randrange(20))]
        body = {"prompt_ids": prompt, "draft_ids": draft, "options": {"max_new_tokens": limit}}
        return body, answer(prompt, limit)

    async def post(self, body: Any, **more: Any) -> httpx.Response:
        response = await self.http.post("/v1/refine", json=body, **more)
        assert response.status_code == 200 or response.json()["error"]["message"]
        return response

    async def stays(self) -> None:
        body, right = self.sound()
        response = await self.post(body)
        assert (response.status_code, response.json()["token_ids"]) == (200, right)
        self.ended["answered"] += 1

    async def watches(self) -> None:
        """The last of a stream's events holds the answer; what was final stays so."""
        body, right = self.sound()
        response = await self.post({**body, "stream": True})
        events = [line for line in response.text.split("\n") if line.startswith("data: ")]
        found = [json.loads(line.removeprefix("data: ")) for line in events]
        assert found[-1]["token_ids"] == right
        for iterate in found[:-1]:
            final = iterate["token_ids"][: iterate["converged_tokens"]]
            assert final == right[: len(final)]
        self.ended["watched"] += 1

    async def leaves(self) -> None:
        body, _ = self.sound()
        try:
            await self.post(body, timeout=self.draw.choice([0.001, 0.005, 0.02]))
        except httpx.TimeoutException:
            self.ended["left"] += 1

    async def leaves_a_stream(self) -> None:
        body, _ = self.sound()
        async with self.http.stream("POST", "/v1/refine", json={**body, "stream": True}) as response:
            async for _ in response.aiter_lines():
                break
        self.ended["left a stream"] += 1

    async def is_late(self) -> None:
        body, _ = self.sound()
        response = await self.post({**body, "timeout": 0})
        assert response.status_code == 504
        self.ended["late"] += 1

    async def is_poisoned(self) -> None:
        """The model fails on it, or gives NaN."""
        kind = self.draw.choice([POISON, NAN])
        response = await self.post({"prompt_ids": [kind, 3], "options": {"max_new_tokens": 5}})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == ("EngineError" if kind == POISON else "NonFiniteLogits")
        self.ended["poisoned"] += 1

    async def is_bad(self) -> None:
        body, _ = self.sound()
        bad = self.draw.choice([
            [], {}, {**body, "prompt_ids": [-1]}, {**body, "prompt_ids": [3] * 600}, {**body, "prompt": "also a text"},
            {**body, "options": {"window": 0}}, {**body, "stream": "yes"}, {**body, "unknown": 1},
        ])  # fmt: skip
        response = await self.post(bad)
        assert response.status_code == 400
        cut = json.dumps(body)[: self.draw.randrange(1, 20)].encode()
        response = await self.http.post("/v1/refine", content=cut, headers={"Content-Type": "application/json"})
        assert response.status_code == 400
        self.ended["bad"] += 1


@pytest.mark.parametrize("seed", range(4))
def test_chaos(seed: int) -> None:
    model = Fragile()
    refiner = AsyncRefiner(make_refiner(model, max_batch_size=4, kv_cache_tokens=16 * 32))

    async def ask(url: str) -> Counter[str]:
        draw = random.Random(seed)
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            client, struck = Client(http, draw), 0
            for _ in range(ROUNDS):
                count = draw.choice([0, 0, 1, 3])
                model.failures[:] = [draw.choice(FAILURES)() for _ in range(count)]
                await asyncio.gather(*(draw.choice(client.ways)() for _ in range(draw.randint(1, 12))))
                await asyncio.to_thread(wait_until, lambda: idle(refiner))
                refiner._refiner.check_integrity()
                struck += count - len(model.failures)
            assert struck
            return client.ended

    with running(create_app(refiner, Settings())) as url:
        ended = asyncio.run(ask(url))
    asyncio.run(refiner.close())
    assert set(ended) == {"answered", "watched", "left", "left a stream", "late", "poisoned", "bad"}, (
        "one way was never gone"
    )
