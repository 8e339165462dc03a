"""/v1/refine, models, health and metrics."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx2 as httpx
import pytest

from engine import DEFAULT_CONDITION, AsyncRefiner, RefineOptions, Refiner, Request
from engine.server import Settings
from engine.server.base import BaseEnding
from engine.server.refine import RefineEndpoint
from tests.engine.server.servers import MODEL, PATIENCE, Base, http, wait_until

REQUEST = {"prompt": "How do I boil an egg?", "draft": "Put the egg in in cold water, boil it — 8 minutes 🥚."}


def post(url: str, body: Any, **more: Any) -> httpx.Response:
    return http.post(f"{url}/v1/refine", json=body, timeout=PATIENCE, **more)


def events(text: str) -> list[tuple[str, Any]]:
    """Names and data of the events in a body."""
    parts = [part.split("\n") for part in text.split("\n\n") if part]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


@pytest.mark.parametrize(
    "options",
    [{}, {"condition": True}, {"steps": 2, "block_size": 16, "keep_prefix": 3}, {"temperature": 1, "seed": 3}],
)
def test_equals_the_engine(options: dict[str, Any], start: Callable[..., str]) -> None:
    template = {"condition": DEFAULT_CONDITION} if options.get("condition") else {}
    with Refiner.from_pretrained(kv_cache_tokens=4096) as engine:
        wanted = engine.refine([REQUEST], RefineOptions(**{"max_new_tokens": 40, **options, **template}))[0]
    url = start(base_url=None)
    answer = post(url, {**REQUEST, "id": "mine", "metadata": {"a": [1]}, "options": options}).json()
    for name in ("text", "token_ids", "converged", "finish_reason"):
        assert answer[name] == getattr(wanted, name)
    assert (answer["id"], answer["metadata"], answer["draft"]) == ("mine", {"a": [1]}, REQUEST["draft"])
    *iterates, (last, result) = events(post(url, {**REQUEST, "options": options, "stream": True}).text)
    assert last == "result"
    assert result["text"] == wanted.text
    assert {name for name, _ in iterates} == {"iterate"}
    for (_, earlier), (_, later) in itertools.pairwise(iterates):
        assert later["converged_text"].startswith(earlier["converged_text"])
        assert later["step"] > earlier["step"]
    assert iterates[-1][1]["converged_text"] == wanted.text


def test_token_ids_in_and_out(start: Callable[..., str], refiner: AsyncRefiner) -> None:
    prompt_ids, draft_ids = refiner.encode(REQUEST)
    url = start(base_url=None)
    answers = [post(url, body).json() for body in (REQUEST, {"prompt_ids": prompt_ids, "draft_ids": draft_ids})]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]


def test_a_list_has_an_answer_or_an_error_each(start: Callable[..., str]) -> None:
    url = start(base_url=None, max_list=5)
    chat = {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "id": 2}
    listed = [REQUEST, chat, {"prompt_ids": [-1], "id": "bad"}, {"prompt_ids": [5] * 3000}]
    results = post(url, {"requests": listed}).json()["results"]
    assert [r["id"] for r in results] == [None, 2, "bad", None]
    assert [(r["error"] or {}).get("code") for r in results] == [None, None, "InvalidRequest", "RequestTooLong"]
    assert results[0]["text"] == post(url, REQUEST).json()["text"]
    assert post(url, {"requests": listed * 2}).status_code == 400


def test_the_base_api_writes_the_draft(start: Callable[..., str], base: Base) -> None:
    url = start()
    body = {"prompt": REQUEST["prompt"], "draft_model": MODEL, "options": {"condition": True}}
    told = events(post(url, {**body, "stream": True}).text)
    assert "".join(data["text"] for name, data in told if name == "draft") == base.text
    whole = post(url, body).json()
    assert whole["draft"] == base.text
    assert (
        whole["text"]
        == told[-1][1]["text"]
        == post(url, {**REQUEST, "draft": base.text, "options": {"condition": True}}).json()["text"]
    )
    assert base.bodies[0]["messages"] == [{"role": "user", "content": REQUEST["prompt"]}]


MALFORMED: list[dict[str, Any]] = [
    {}, {"prompt": 5}, {"prompt": ""}, {"prompt": "a", "prompt_ids": [1]}, {**REQUEST, "draft_ids": [1]},
    {"prompt": "\ud800"},
    {**REQUEST, "draft": "\udfff"}, {**REQUEST, "unknown": 1}, {**REQUEST, "seed": -1}, {**REQUEST, "id": [1]},
    {**REQUEST, "metadata": 5}, {**REQUEST, "stream": 1}, {**REQUEST, "timeout": -1}, {**REQUEST, "timeout": 10**9},
    {**REQUEST, "timeout": True}, {**REQUEST, "options": []}, {**REQUEST, "options": {"concurrency": 1}},
    {**REQUEST, "options": {"temperature": -1}}, {**REQUEST, "options": {"max_new_tokens": 10**6}},
    {**REQUEST, "options": {"condition": "{prompt:>1000000000}{draft}"}}, {**REQUEST, "options": {"window": "wide"}},
    {"requests": []}, {"requests": 5}, {"requests": [5]}, {"requests": [REQUEST], "stream": True},
    {"requests": [REQUEST], "prompt": "a"}, {"prompt": "a", "draft_model": MODEL}, {"messages": [{"role": "user"}]},
    {"prompt_ids": [10**30]}, {"prompt_ids": [1.5]}, {"prompt_ids": [True]},
]  # fmt: skip


def test_malformed(start: Callable[..., str]) -> None:
    url = start(base_url=None) + "/v1/refine"
    with httpx.Client(headers={"Content-Type": "application/json"}) as client:
        for body in MALFORMED:
            streamed = [] if {"stream", "requests"} & set(body) else [{**body, "stream": True}]
            for sent in (body, *streamed):
                response = client.post(url, content=json.dumps(sent))
                assert response.status_code == 400, sent
                assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_deadline(start: Callable[..., str]) -> None:
    url = start(base_url=None)
    response = post(url, {**REQUEST, "timeout": 0})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "DeadlineExceeded")


def test_health_metrics_models_and_the_document(start: Callable[..., str]) -> None:
    url = start(base_url=None, model_name="small")
    assert http.get(f"{url}/health").json() == {"status": "alive"}
    post(url, REQUEST)
    metrics = http.get(f"{url}/metrics")
    assert "diffpo_requests_total{reason=" in metrics.text
    assert metrics.headers["content-type"].startswith("text/plain; version=")
    models = http.get(f"{url}/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["small"]
    assert models["refine"]["options"]["max_new_tokens"] == 40
    assert http.get(f"{url}/openapi.json").json()["openapi"] == "3.1.0"
    for method, path, status in (("GET", "/v1/refine", 405), ("POST", "/health", 405), ("GET", "/nothing", 404)):
        response = http.request(method, f"{url}{path}")
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_a_draft_that_is_late_or_withheld(start: Callable[..., str], base: Base) -> None:
    url = start()
    body: dict[str, Any] = {"prompt": REQUEST["prompt"], "draft_model": MODEL}
    base.held_after = 2
    for timeout in (0.3, 2, 10):  # where the machine is so slow that nothing has come by then, more
        late = post(url, {**body, "timeout": timeout})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "DeadlineExceeded")
        *_, (name, told) = events(post(url, {**body, "timeout": timeout, "stream": True}).text)
        if name == "error":
            break
    assert (name, told["error"]["code"]) == ("error", "DeadlineExceeded")
    wait_until(lambda: base.left_early == base.begun > 0)
    base.held_after, base.finish = None, "content_filter"
    withheld = post(url, {**body, "timeout": 20})
    assert (withheld.status_code, withheld.json()["error"]["code"]) == (400, "content_filter")


@pytest.mark.parametrize("moments", range(6))
def test_leaving_just_as_a_piece_of_the_draft_arrives(moments: int, shared_refiner: AsyncRefiner) -> None:
    """The cancellation is not lost, however many turns of the event loop it comes behind the piece."""

    class Writer:
        def __init__(self) -> None:
            self.more = asyncio.Event()

        async def write(self, body: Any, ending: BaseEnding) -> AsyncGenerator[str, None]:
            yield "a"
            await self.more.wait()
            yield "b"
            await asyncio.Event().wait()

    async def leave() -> None:
        writer: Any = Writer()
        endpoint = RefineEndpoint(shared_refiner, writer, Settings(base_url="http://127.0.0.1:1/v1"))
        seen: list[str] = []

        async def read() -> None:
            async for text in endpoint._write("m", Request(prompt="egg"), time.monotonic() + 600):
                seen.append(text)

        reader = asyncio.ensure_future(read())
        while not seen:
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)  # until it waits for the next piece
        writer.more.set()
        for _ in range(moments):
            await asyncio.sleep(0)
        reader.cancel()
        await asyncio.wait([reader], timeout=20)
        assert reader.cancelled()

    asyncio.run(leave())
