"""POST /v1/chat/completions: a chat whose answer the base API drafts and the refiner gives."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from engine.async_refiner import AsyncRefiner
from engine.server.answer import Answer, Blocks
from engine.server.base import BaseAPI, BaseEnding
from engine.server.chat_body import ChatBody
from engine.server.drafts import Draft
from engine.server.events import DONE, event, stream
from engine.server.json_body import dump, read_object
from engine.server.settings import Settings


class ChatEndpoint:
    """Answers chat completions, streamed or not, with the same text."""

    def __init__(self, refiner: AsyncRefiner, base: BaseAPI | None, settings: Settings) -> None:
        self._refiner, self._base, self._settings = refiner, base, settings

    async def __call__(self, request: HttpRequest) -> Response:
        completion = _Completion(ChatBody.parse(await read_object(request), self._settings))
        if completion.body.stream:
            return await stream(self._events(completion), lambda error: event(error.body))
        async with aclosing(self._deltas(completion)) as deltas:
            text = "".join([delta async for delta in deltas])
        return Response(dump(completion.whole(text)), media_type="application/json")

    async def _events(self, completion: "_Completion") -> AsyncGenerator[bytes, None]:
        async with aclosing(self._deltas(completion)) as deltas:
            role: dict[str, str] = {"role": "assistant"}
            async for delta in deltas:
                yield event(completion.chunk({**role, "content": delta}))
                role = {}
        yield event(completion.chunk(role, completion.answer.openai_reason))
        if completion.body.include_usage:
            yield event({**completion.head("chat.completion.chunk"), "choices": [], "usage": completion.usage})
        yield DONE

    async def _deltas(self, completion: "_Completion") -> AsyncGenerator[str, None]:
        """The answer's text as it becomes final."""
        body, settings = completion.body, self._settings
        due = time.monotonic() + settings.timeout
        options = (
            body.options if self._base else replace(body.options, condition=None)
        )  # without drafts: nothing to show
        # what does not fit is told before the base API has worked for it
        prompt_ids, _ = await asyncio.to_thread(
            self._refiner.encode, {"messages": body.messages}, replace(options, condition=None)
        )
        completion.prompt_tokens = len(prompt_ids)
        block = settings.stream_block if options.steps is None else options.block_size
        blocks = Blocks(
            refiner=self._refiner, messages=body.messages, options=options, block=block, due=due, streamed=body.stream
        )  # fmt: skip
        written = self._base.write(body.base_body, completion.ending) if self._base else _nothing()
        async with aclosing(written):
            draft = Draft(self._refiner, body.messages, options, written)
            async with aclosing(blocks.deltas(prompt_ids, draft, completion.ending, completion.answer)) as deltas:
                async for delta in deltas:
                    yield delta


async def _nothing() -> AsyncGenerator[str, None]:
    for text in "":
        yield text


class _Completion:
    """One answer in OpenAI's words."""

    def __init__(self, body: ChatBody) -> None:
        self.body = body
        self.answer, self.ending = Answer(), BaseEnding()
        self.prompt_tokens = 0
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.body.model}

    @property
    def usage(self) -> dict[str, int]:
        """In the refiner's tokens, without those of a draft in the prompt."""
        answer = len(self.answer.token_ids)
        total = self.prompt_tokens + answer
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": answer, "total_tokens": total}

    @property
    def _refine(self) -> dict[str, Any]:
        """What OpenAI's objects have no field for."""
        answer, ending = self.answer, self.ending
        return {
            "steps": answer.steps, "converged": answer.converged, "forward_tokens": answer.forward_tokens,
            "base_finish_reason": ending.finish_reason, "base_usage": ending.usage,
        }  # fmt: skip

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = {**self.head("chat.completion.chunk"), "choices": [choice]}
        return chunk if finish_reason is None else {**chunk, "refine": self._refine}

    def whole(self, text: str) -> dict[str, Any]:
        choice = {
            "index": 0, "message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": None,
            "finish_reason": self.answer.openai_reason,
        }  # fmt: skip
        return {**self.head("chat.completion"), "choices": [choice], "usage": self.usage, "refine": self._refine}
