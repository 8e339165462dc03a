"""The base API: whoever writes the drafts, behind OpenAI's chat completions."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

from engine.server.errors import ApiError
from engine.server.events import read_events
from engine.server.json_body import dump
from engine.server.settings import Settings
from engine.trajectories.endpoint import completions_url, retry_after

CONNECT_SECONDS = 10.0
LONGEST_ERROR = 4096
"""Bytes read of a body that is an error."""
OVERHEAD = 64
"""Times that a streamed body may be larger than the text in it."""
FILTERED = "content_filter"


@dataclass(slots=True)
class BaseEnding:
    """What a base API told beside its text."""

    finish_reason: str | None = None
    usage: dict[str, Any] | None = None


class BaseAPI:
    """A client for one event loop. Requests are not repeated: whoever asks this server decides whether to."""

    def __init__(self, settings: Settings) -> None:
        assert settings.base_url is not None
        self._settings = settings
        self._url = completions_url(settings.base_url)
        headers = {"Authorization": f"Bearer {settings.base_key}"} if settings.base_key else {}
        timeout = httpx.Timeout(settings.base_timeout, connect=min(CONNECT_SECONDS, settings.base_timeout))
        limits = httpx.Limits(max_connections=settings.max_in_progress, max_keepalive_connections=32)
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)

    async def write(self, body: Mapping[str, Any], ending: BaseEnding) -> AsyncGenerator[str, None]:
        """The answer's text as it arrives; ``ending`` is filled by the end. Raises ApiError."""
        body = {**body, "stream": True}
        if self._settings.base_usage:
            body["stream_options"] = {"include_usage": True}
        size = 0
        async with (
            self._open("POST", self._url, body) as response,
            aclosing(self._limited(response)) as chunks,
            aclosing(read_events(chunks)) as events,
        ):
            async for data in events:
                if data.strip() == b"[DONE]":
                    break
                text = _read_chunk(data, ending)
                size += len(text.encode("utf-8", "surrogatepass"))
                if size > self._settings.max_draft_bytes:
                    raise ApiError(502, f"the base API's answer exceeds {self._settings.max_draft_bytes} bytes")
                if text:
                    yield text
        if ending.finish_reason is None:
            raise ApiError(502, "the base API's answer ended before it was complete", code="base_incomplete")

    async def models(self) -> list[dict[str, Any]]:
        """What the base API lists. Raises ApiError."""
        url = self._url.removesuffix("/chat/completions") + "/models"
        async with self._open("GET", url, None) as response:
            content = b"".join([chunk async for chunk in self._limited(response)])
        try:
            models = json.loads(content)["data"]
            if not all(isinstance(model["id"], str) for model in models):
                raise TypeError("a model's id is no string")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ApiError(502, f"the base API's list of models cannot be read: {error!r:.100}") from None
        return list(models)

    async def close(self) -> None:
        await self._client.aclose()

    @asynccontextmanager
    async def _open(self, method: str, url: str, body: object) -> AsyncIterator[httpx.Response]:
        """A response of status 200, not yet read."""
        headers = {} if body is None else {"Content-Type": "application/json"}
        content = None if body is None else dump(body)
        try:
            async with self._client.stream(method, url, content=content, headers=headers) as response:
                if response.status_code != 200:
                    raise await _refusal(response)
                yield response
        except httpx.TimeoutException as error:
            raise ApiError(
                504, f"the base API did not answer in time ({type(error).__name__})", code="base_timeout"
            ) from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise ApiError(
                502, f"the base API failed: {type(error).__name__}: {error!s:.200}", code="base_failed"
            ) from None

    async def _limited(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        size = 0
        async for chunk in response.aiter_bytes():
            size += len(chunk)
            if size > OVERHEAD * self._settings.max_draft_bytes:
                raise ApiError(502, "the base API's body is too large")
            yield chunk


def _read_chunk(data: bytes, ending: BaseEnding) -> str:
    """The text that one chunk of a completion adds."""
    try:
        chunk = json.loads(data)
        if chunk.get("error"):
            raise ApiError(502, f"the base API failed while it answered: {_message(chunk)}", code="base_failed")
        if isinstance(chunk.get("usage"), dict):
            ending.usage = chunk["usage"]
        choice = (chunk.get("choices") or [{}])[0]
        delta = choice.get("delta") or {}
        reason, text = choice.get("finish_reason"), delta.get("content") or ""
        if not isinstance(text, str) or not isinstance(reason, str | None):
            raise TypeError(f"content is {type(text).__name__}, finish_reason {type(reason).__name__}")
    except (ValueError, AttributeError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise ApiError(502, f"the base API sent no chat completion: {error!r:.100}", code="base_garbage") from None
    if delta.get("refusal"):
        reason = FILTERED
    ending.finish_reason = ending.finish_reason or reason
    return text


async def _refusal(response: httpx.Response) -> ApiError:
    """What a status other than 200 is to our client: its own fault, everybody's, or the base API's."""
    content = b""
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > LONGEST_ERROR:
            break
    status, wait = response.status_code, retry_after(response.headers)
    text = f"the base API answered {status}: {_message(_parse(content))}"
    if status == 429:
        return ApiError(429, text, code="base_rate_limit", retry_after=wait)
    if status in (400, 413, 422):
        return ApiError(400, text, code="base_refused")
    if status == 404:
        return ApiError(404, text, code="base_not_found")
    if status in (401, 403):
        return ApiError(502, f"{text}; the key is this server's, not yours", code="base_key")
    if status in (408, 504):
        return ApiError(504, text, code="base_timeout")
    return ApiError(502, text, code="base_failed", retry_after=wait)


def _parse(content: bytes) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return content.decode("utf-8", "replace")


def _message(value: object) -> str:
    """The message in an error's body, whatever its shape, in one short line."""
    if isinstance(value, dict):
        error = value.get("error", value)
        value = error.get("message", error) if isinstance(error, dict) else error
    return f"{' '.join(str(value).split()):.300}"
