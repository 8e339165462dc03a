"""A base API that is slow, fails, or is not there; clients that leave."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import openai
import pytest

from engine import AsyncRefiner
from engine.errors import (
    DeadlineExceeded,
    EngineDead,
    EngineError,
    NonFiniteLogits,
    OutOfMemory,
    QueueFull,
    RequestTooLong,
)
from engine.server import Settings, create_app
from engine.server.errors import api_error
from engine.server.events import read_events
from tests.engine.server.servers import MODEL, PATIENCE, Base, http, idle, running, wait_until
from tests.engine.server.test_chat import LONG, QUESTION, client
from tests.engine.service.loops import held_back

FAULTS: list[tuple[str, int, str]] = [
    ("429", 429, "base_rate_limit"), ("500", 502, "base_failed"), ("503", 502, "base_failed"), ("301", 502, "base_failed"),
    ("400", 400, "base_refused"), ("422", 400, "base_refused"), ("404", 404, "base_not_found"), ("401", 502, "base_key"),
    ("403", 502, "base_key"), ("408", 504, "base_timeout"), ("garbage", 502, "base_garbage"), ("list", 502, "base_garbage"),
    ("error", 502, "base_failed"), ("cut", 502, "base_incomplete"), ("silent", 504, "base_timeout"),
]  # fmt: skip


def test_faults_are_told_as_what_they_are(start: Callable[..., str], base: Base) -> None:
    patient, hasty = client(start()), client(start(base_timeout=0.3))
    for fault, status, code in FAULTS:
        api = hasty if fault == "silent" else patient
        base.fault, base.retry_after = fault, "7" if fault in ("429", "503") else None
        for stream in (False, True):
            with pytest.raises(openai.APIStatusError) as failed:
                api.chat.completions.create(model=MODEL, messages=QUESTION, stream=stream)
            assert (failed.value.status_code, failed.value.code) == (status, code)
            assert failed.value.response.headers.get("retry-after") == base.retry_after
            if fault.isdigit():
                assert "no, not now" in failed.value.message
    base.fault = "500"
    with pytest.raises(openai.InternalServerError):
        patient.models.list()


def test_a_fault_in_the_midst_ends_the_stream_with_an_error(start: Callable[..., str], base: Base) -> None:
    base.text, base.finish = LONG, None
    chunks = client(start(stream_block=16)).chat.completions.create(
        model=MODEL, messages=QUESTION, stream=True, extra_body={"refine": {"max_new_tokens": 600}}
    )
    text = ""

    def read() -> None:
        nonlocal text
        for chunk in chunks:
            text += chunk.choices[0].delta.content or ""

    with pytest.raises(openai.APIError, match="before it was complete"):
        read()
    assert text


def test_nobody_listens(start: Callable[..., str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        api = client(start(base_url=f"http://127.0.0.1:{taken.getsockname()[1]}/v1"))
        with pytest.raises(openai.InternalServerError) as failed:
            api.chat.completions.create(model=MODEL, messages=QUESTION)
        assert failed.value.code == "base_failed"


def test_a_draft_without_end(start: Callable[..., str], base: Base) -> None:
    base.text = "egg " * 3000
    api = client(start(max_draft_bytes=5000))
    with pytest.raises(openai.InternalServerError, match="exceeds 5000 bytes"):
        api.chat.completions.create(model=MODEL, messages=QUESTION, extra_body={"refine": {"condition": True}})


CHAT = {"model": MODEL, "messages": QUESTION}
LEAVING: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {**CHAT, "refine": {"max_new_tokens": 900, "window": 1}}),
    ("/v1/chat/completions", {**CHAT, "stream": True, "refine": {"max_new_tokens": 900, "window": 1}}),
    (
        "/v1/refine",
        {"prompt": "a", "draft_model": MODEL, "stream": True, "options": {"max_new_tokens": 900, "window": 1}},
    ),
    ("/v1/refine", {"prompt": "a", "draft_model": MODEL, "options": {"max_new_tokens": 900, "window": 1}}),
]


@contextmanager
def leaving(url: str, path: str, body: dict[str, Any]) -> Iterator[None]:
    """A client that asks, and goes at the end of the block without its answer."""
    host, port = url.removeprefix("http://").split(":")
    request = httpx.Request("POST", url + path, json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        yield


def test_a_client_that_leaves_ends_the_draft(start: Callable[..., str], base: Base) -> None:
    base.held_after = 2
    url = start()
    for i, (path, body) in enumerate(LEAVING, 1):
        with leaving(url, path, body):
            wait_until(lambda i=i: base.begun == i)  # type: ignore[misc]
        # it goes just as the first pieces arrive
        wait_until(lambda i=i: base.left_early == i)  # type: ignore[misc]


def test_a_client_that_leaves_ends_the_refinement(start: Callable[..., str], base: Base, refiner: AsyncRefiner) -> None:
    url = start(stream_block=900)
    model = refiner._refiner._alive().model
    before = cancelled(url)
    for i, (path, body) in enumerate(LEAVING, 1):
        with held_back(model) as gate:
            with leaving(url, path, body):
                wait_until(lambda gate=gate: gate.passes == 1)  # type: ignore[misc]
            wait_until(lambda: len(refiner._worker.inbox) > 0)  # the engine is told while its step still runs
            gate.open()
            wait_until(lambda: idle(refiner))
        assert gate.passes == 1
        wait_until(lambda i=i: cancelled(url) == before + i)  # type: ignore[misc]


def cancelled(url: str) -> float:
    """Requests that the engine has dropped."""
    for line in http.get(f"{url}/metrics").text.splitlines():
        if line.startswith('diffpo_requests_total{reason="cancelled"}'):
            return float(line.split()[1])
    return 0.0


def test_a_slow_reader_holds_up_nobody(start: Callable[..., str], base: Base) -> None:
    url = start()
    body = {"prompt": "a", "stream": True, "options": {"max_new_tokens": 600, "window": 1}}
    with httpx.Client(timeout=PATIENCE) as one, one.stream("POST", f"{url}/v1/refine", json=body) as slow:
        assert slow.status_code == 200
        answers = [client(url).chat.completions.create(model=MODEL, messages=QUESTION) for _ in range(3)]
        assert all(answer.choices[0].message.content for answer in answers)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestTooLong("x"), 400), (QueueFull("x", 2.3), 429), (DeadlineExceeded("x"), 504), (EngineDead("x"), 503),
        (OutOfMemory("x"), 503), (NonFiniteLogits("x"), 500), (EngineError("x"), 500),
    ],
)  # fmt: skip
def test_errors_of_the_engine(error: Any, status: int, caplog: pytest.LogCaptureFixture) -> None:
    """Those that quote others' exceptions are told without these, and logged; a dead engine has logged its end already."""
    error.args = ("in /home/someone/secret.cpp", *error.args[1:])
    told = api_error(error)
    quoting = type(error) in (EngineError, OutOfMemory, EngineDead)
    assert ("secret" in str(told)) == (not quoting)
    assert ("secret" in caplog.text) == (type(error) in (EngineError, OutOfMemory))
    assert told.status == status
    assert told.body["error"]["code"] == type(error).__name__
    assert told.headers == (
        {"Retry-After": "3"} if status == 429 else {"Retry-After": "1"} if isinstance(error, OutOfMemory) else {}
    )


def test_a_full_queue_a_draining_server_and_a_dead_engine() -> None:
    refiner = AsyncRefiner.from_pretrained(kv_cache_tokens=1024, max_batch_size=1, max_queue_requests=1)
    app = create_app(refiner, Settings())
    body = {"prompt": "egg", "options": {"max_new_tokens": 20}}
    with running(app) as url, httpx.Client(timeout=PATIENCE) as api:
        asyncio.run(refiner.pause())

        async def ask(count: int) -> list[httpx.Response]:
            async with httpx.AsyncClient(timeout=PATIENCE) as client:
                asked = [asyncio.ensure_future(client.post(f"{url}/v1/refine", json=body)) for _ in range(count)]
                while sum(one.done() for one in asked) < count - 1:
                    await asyncio.sleep(0.01)
                refiner.resume()
                return await asyncio.gather(*asked)

        responses = asyncio.run(ask(4))
        assert sorted(r.status_code for r in responses) == [200, 429, 429, 429]
        shed = next(r for r in responses if r.status_code == 429)
        assert shed.json()["error"]["code"] == "QueueFull"
        assert int(shed.headers["retry-after"]) >= 1
        app.state.server.drain()
        assert api.get(f"{url}/health").json() == {"status": "draining"}
        assert api.post(f"{url}/v1/refine", json=body).status_code == 503
        app.state.server.draining = False
        asyncio.run(refiner.close())
        health = api.get(f"{url}/health")
        assert (health.status_code, health.json()) == (503, {"status": "dead"})
        for path, sent in (("/v1/refine", body), ("/v1/chat/completions", {**CHAT, "model": "refiner"})):
            dead = api.post(url + path, json=sent)
            assert (dead.status_code, dead.json()["error"]["code"]) == (503, "EngineDead")


def test_a_fault_of_the_server_itself(start: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told without its details, and costs nobody else anything."""
    monkeypatch.setattr("engine.server.chat.secrets.token_hex", lambda _: 1 / 0)
    api = client(start())
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as failed:
            api.chat.completions.create(model=MODEL, messages=QUESTION, stream=stream)
        assert (failed.value.status_code, failed.value.code) == (500, "unexpected")
        assert "zero" not in failed.value.message
    monkeypatch.undo()
    assert api.chat.completions.create(model=MODEL, messages=QUESTION).choices[0].message.content


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_read_however_they_are_cut(size: int) -> None:
    body = b"\xef: no field\n: comment\n\ndata:one\r\n\r\nevent: x\ndata: two\ndata:  lines\n\n\n\n"
    body += b'data: {"a": 1}\nid: 5\n\ndata: last'

    async def read() -> list[bytes]:
        async def chunks() -> AsyncIterator[bytes]:
            for i in range(0, len(body), size):
                yield body[i : i + size]

        return [event async for event in read_events(chunks())]

    assert asyncio.run(read()) == [b"one", b"two\n lines", b'{"a": 1}', b"last"]
