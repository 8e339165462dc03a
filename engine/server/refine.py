"""POST /v1/refine: drafts given by the caller, or written by the base API, refined with every step shown on request."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import anyio
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from engine.async_refiner import AsyncRefiner
from engine.errors import EngineError, InvalidRequest
from engine.options import RefineOptions
from engine.request import Request, Result
from engine.server.base import FILTERED, BaseAPI, BaseEnding
from engine.server.chat_body import check_model
from engine.server.errors import ApiError, api_error, bad_request
from engine.server.events import event, stream
from engine.server.json_body import check_known, describe, dump, read_flag, read_object
from engine.server.options_body import read_options
from engine.server.settings import Settings
from engine.service.ticket import Iterate

ONE = ("prompt", "messages", "prompt_ids", "draft", "draft_ids", "id", "seed", "metadata")
"""Fields of engine.Request."""
SHARED = ("options", "stream", "timeout")


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineBody:
    """What was asked for: one request, or a list of them."""

    requests: list[Request]
    listed: bool
    options: RefineOptions
    stream: bool
    timeout: float
    """Seconds."""
    condition_asked: bool
    """Whether ``condition`` is this request's own wish."""
    draft_model: str | None
    """The base API's model that is to write the draft."""

    @classmethod
    def parse(cls, body: dict[str, Any], settings: Settings) -> "RefineBody":
        """Raises ApiError."""
        listed = "requests" in body
        check_known(body, {*SHARED, *(("requests",) if listed else (*ONE, "draft_model"))}, "a refinement")
        stream = read_flag(body, "stream")
        if listed and stream:
            raise bad_request("stream shows one request: leave requests out", "stream")
        values = body["requests"] if listed else [{name: body[name] for name in ONE if body.get(name) is not None}]
        if not isinstance(values, list) or not 1 <= len(values) <= settings.max_list:
            raise bad_request(f"requests must be a list of 1 to {settings.max_list} objects", "requests")
        return cls(
            requests=[_read_request(value, i if listed else None) for i, value in enumerate(values)],
            listed=listed,
            options=read_options(body.get("options"), settings, "options"),
            stream=stream,
            timeout=_read_timeout(body.get("timeout"), settings.timeout),
            condition_asked=bool((body.get("options") or {}).get("condition")),
            draft_model=None if listed else _read_draft_model(body, settings),
        )


class RefineEndpoint:
    """Refines drafts."""

    def __init__(self, refiner: AsyncRefiner, base: BaseAPI | None, settings: Settings) -> None:
        self._refiner, self._base, self._settings = refiner, base, settings

    async def __call__(self, request: HttpRequest) -> Response:
        body = RefineBody.parse(await read_object(request), self._settings)
        due = time.monotonic() + body.timeout
        if body.stream:
            return await stream(self._events(body, due), lambda error: event(error.body, "error"))
        if body.listed:
            tasks = (self._refine_listed(one, body, due) for one in body.requests)
            return _json({"results": await asyncio.gather(*tasks)})
        one = body.requests[0]
        if body.draft_model is not None:
            draft = "".join([text async for text in self._write(body.draft_model, one, due)])
            one = replace(one, draft=draft)
        return _json({**_result(await self._refine(one, body, due), one), "draft": one.draft})

    async def _refine(self, one: Request, body: RefineBody, due: float) -> Result:
        one, options = await self._encoded(one, body)
        return await self._refiner.refine(one, options, deadline=_left(due))

    async def _refine_listed(self, one: Request, body: RefineBody, due: float) -> dict[str, Any]:
        try:
            return {**_result(await self._refine(one, body, due), one), "error": None}
        except EngineError as error:
            return {"id": one.id, "metadata": one.metadata, **api_error(error).body}

    async def _events(self, body: RefineBody, due: float) -> AsyncGenerator[bytes, None]:
        one = body.requests[0]
        if body.draft_model is not None:
            parts = []
            async with aclosing(self._write(body.draft_model, one, due)) as texts:
                async for text in texts:
                    parts.append(text)
                    yield event({"text": text}, "draft")
            one = replace(one, draft="".join(parts))
        given = one
        one, options = await self._encoded(one, body)
        async with aclosing(self._refiner.stream(one, options, deadline=_left(due))) as iterates:
            async for iterate in iterates:
                yield event(_iterate(iterate), "iterate")
                if iterate.result is not None:
                    yield event(_result(iterate.result, given), "result")

    async def _encoded(self, one: Request, body: RefineBody) -> tuple[Request, RefineOptions]:
        """The same request in token ids, computed beside the event loop."""
        options = body.options
        if one.draft is None and not body.condition_asked:  # the server's own condition is for drafts that can be shown
            options = replace(options, condition=None)
        prompt_ids, draft_ids = await asyncio.to_thread(self._refiner.encode, one, options)
        encoded = Request(
            prompt_ids=prompt_ids, draft_ids=draft_ids, id=one.id, seed=one.seed, metadata=one.metadata
        )  # fmt: skip
        return encoded, replace(options, condition=None)

    async def _write(self, model: str, one: Request, due: float) -> AsyncGenerator[str, None]:
        """The base API's draft."""
        assert self._base is not None
        messages = one.messages or [{"role": "user", "content": one.prompt or ""}]
        ending = BaseEnding()
        async with aclosing(self._base.write({"model": model, "messages": messages}, ending)) as texts:
            while True:
                try:
                    # not asyncio.wait_for: before Python 3.12 it loses a cancellation that comes with a result
                    with anyio.fail_after(_left(due)):
                        text = await anext(texts, None)
                except TimeoutError:
                    raise ApiError(504, "the draft was not complete at the deadline", code="DeadlineExceeded") from None
                if text is None:
                    break
                yield text
        if ending.finish_reason == FILTERED:  # what the base API will not say, the refiner is not asked to
            raise bad_request("the base API's content filter withheld the draft", code=FILTERED)


def _read_request(value: object, index: int | None) -> Request:
    where = "" if index is None else f"requests[{index}]: "
    if not isinstance(value, dict):
        raise bad_request(f"{where}a request must be an object, got {describe(value)}", "requests")
    try:
        return Request.parse({name: given for name, given in value.items() if given is not None})
    except InvalidRequest as error:
        raise bad_request(f"{where}{error}", None if index is None else "requests") from None


def _read_timeout(value: object, most: float) -> float:
    if value is None:
        return most
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
        raise bad_request(f"timeout must be seconds in 0 .. {most}, got {describe(value)}", "timeout")
    return value


def _read_draft_model(body: dict[str, Any], settings: Settings) -> str | None:
    model = body.get("draft_model")
    if model is None:
        return None
    if not isinstance(model, str) or not model:
        raise bad_request(f"draft_model must be a name, got {describe(model)}", "draft_model")
    if settings.base_url is None:
        raise bad_request("draft_model needs a base API, and this server has none: give a draft", "draft_model")
    if any(body.get(name) is not None for name in ("draft", "draft_ids", "prompt_ids")):
        raise bad_request("draft_model takes prompt or messages, and no draft", "draft_model")
    check_model(model, settings)
    return model


def _left(due: float) -> float:
    return max(0.0, due - time.monotonic())


def _iterate(iterate: Iterate) -> dict[str, Any]:
    names = ("step", "token_ids", "converged_tokens", "converged_text", "tentative_text")
    return {name: getattr(iterate, name) for name in names}


def _result(result: Result, request: Request) -> dict[str, Any]:
    names = ("text", "token_ids", "steps", "converged", "forward_tokens", "finish_reason", "seconds", "metadata")
    return {"id": request.id, **{name: getattr(result, name) for name in names}}


def _json(value: object) -> Response:
    return Response(dump(value), media_type="application/json")
