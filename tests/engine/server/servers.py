"""Real servers on the loopback interface: the application, and a base API that follows a script."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from engine import AsyncRefiner

MODEL = "writer"
PATIENCE = 60.0
"""Seconds that a test waits for what must come, however busy the machine is."""

http = httpx.Client(timeout=PATIENCE)


@contextmanager
def running(app: Any, **more: Any) -> Iterator[str]:
    """Serves an ASGI application in a thread; gives its URL."""
    config = uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=5, **more)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come about"
        time.sleep(0.005)


def idle(refiner: AsyncRefiner) -> bool:
    """Whether nothing waits or runs and every page is free."""
    scheduler = refiner._refiner._alive()
    pool = scheduler.cache.pool
    return scheduler.load == 0 and refiner._admission.requests == 0 and pool.free_count == pool.size


@dataclass
class Base:
    """A scripted base API, and what it has seen."""

    text: str = "Put the egg in cold water and boil it it for nine minutes ."
    pieces: int = 5
    """Characters that arrive together."""
    delay: float = 0.0
    """Seconds before each piece."""
    finish: str | None = "stop"
    fault: str | None = None
    """A status as digits, "garbage", "error", "cut", "silent", "refusal" or "list"."""
    retry_after: str | None = None
    held_after: int | None = None
    """Pieces after which nothing comes until ``release`` is set."""
    release: threading.Event = field(default_factory=threading.Event)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    begun: int = 0
    """Answers whose writing has begun."""
    sent: int = 0
    left_early: int = 0
    """Answers whose reader went before they ended."""

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/models", self._models),
            ]
        )

    async def _held(self) -> None:
        while not self.release.is_set():
            await asyncio.sleep(0.005)

    async def _models(self, request: Request) -> Response:
        if self.fault:
            return await self._chat(request)
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "test"}]})

    async def _chat(self, request: Request) -> Response:
        body = await request.body()
        self.bodies.append(json.loads(body) if body else {})
        self.headers.append(dict(request.headers))
        if self.fault == "silent":
            await self._held()
        if self.fault and self.fault.isdigit():
            headers = {"Retry-After": self.retry_after} if self.retry_after else {}
            return JSONResponse({"error": {"message": "no, not now"}}, int(self.fault), headers)
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[bytes]:
        done = False
        self.begun += 1
        try:
            if self.fault in ("garbage", "list", "error"):
                yield {
                    "garbage": b'data: {"choices": [\n\n',
                    "list": b"data: [[]]\n\n",
                    "error": b'data: {"error": {"message": "out of tokens"}}\n\n',
                }[self.fault]
            yield b": a comment\r\n\r\n" + _chunk({"role": "assistant", "content": ""})
            for i, start in enumerate(range(0, len(self.text), self.pieces)):
                if i == self.held_after:
                    await self._held()
                if self.delay:
                    await asyncio.sleep(self.delay)
                self.sent = i + 1
                yield _chunk({"content": self.text[start : start + self.pieces]})
                if self.fault == "cut" and i == 2:
                    done = True
                    return
            if self.fault == "refusal":
                yield _chunk({"refusal": "I won't"})
            yield _chunk({}, self.finish)
            yield b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}\n\n'
            yield b"data: [DONE]\n\n"
            done = True
        finally:
            self.left_early += not done


def _chunk(delta: dict[str, str], finish: str | None = None) -> bytes:
    return (
        b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}).encode() + b"\n\n"
    )
