"""An answer refined block by block while its draft may still arrive."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from engine.async_refiner import AsyncRefiner
from engine.options import RefineOptions
from engine.request import FinishReason, Result
from engine.server.base import FILTERED, BaseEnding
from engine.server.drafts import Draft


@dataclass(slots=True)
class Answer:
    """What has been refined so far."""

    token_ids: list[int] = field(default_factory=list)
    steps: int = 0
    forward_tokens: int = 0
    converged: bool = True
    finish_reason: FinishReason | None = None
    """None: not finished, or ended by the base API's content filter."""

    @property
    def openai_reason(self) -> str:
        """finish_reason as OpenAI names it."""
        if self.finish_reason is None:
            return FILTERED
        return "length" if self.finish_reason == "length" else "stop"

    def add(self, result: Result, end: int, limit: int) -> None:
        """Takes the result of the request whose longest answer was ``end``."""
        self.token_ids = result.token_ids
        self.steps += result.steps
        self.forward_tokens += result.forward_tokens
        self.converged = self.converged and result.converged
        if result.finish_reason == "eos" or len(self.token_ids) < end:
            self.finish_reason = "eos"
        elif end == limit:
            self.finish_reason = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Refines the draft of one chat. The first block starts as soon as its draft is there; each further one is a request of
    its own, behind the blocks before it, whose positions it computes again. When the draft is complete the rest is one block.

    With ``condition`` the draft is part of the prompt, so that nothing can start before all of it is there.
    """

    refiner: AsyncRefiner
    messages: list[dict[str, str]]
    options: RefineOptions
    block: int
    """Tokens; ``options.block_size`` with ``steps``, whose answers depend on where blocks end."""
    due: float
    """On time.monotonic's clock."""
    streamed: bool
    """Whether text is wanted before a block is finished."""

    async def deltas(
        self, prompt_ids: list[int], draft: Draft, ending: BaseEnding, answer: Answer
    ) -> AsyncGenerator[str, None]:
        """Yields final text; fills ``answer``. ``prompt_ids``: of the chat without its draft."""
        options = self.options
        if options.condition is not None:
            request = {"messages": self.messages, "draft": await draft.whole()}
            prompt_ids, draft_ids = await asyncio.to_thread(self.refiner.encode, request, options)
            draft.settle(draft_ids)
            options = replace(options, condition=None)
        sent, limit = 0, options.max_new_tokens
        while answer.finish_reason is None:
            end = min(len(answer.token_ids) + self.block, limit)
            draft_ids = await draft.at_least(end)
            if ending.finish_reason == FILTERED:
                return
            if draft.complete:
                end = limit
            block = {
                "prompt_ids": prompt_ids, "draft_ids": answer.token_ids + draft_ids[len(answer.token_ids) :],
            }  # fmt: skip
            kept = max(options.keep_prefix, len(answer.token_ids))
            async with aclosing(self._refine(block, replace(options, max_new_tokens=end, keep_prefix=kept))) as news:
                async for text, result in news:
                    if result is not None:
                        answer.add(result, end, limit)
                    if answer.finish_reason is None:
                        text = text.rstrip("\ufffd")  # tokens may end inside a character
                    if len(text) > sent:
                        yield text[sent:]
                        sent = len(text)

    async def _refine(
        self, request: dict[str, Any], options: RefineOptions
    ) -> AsyncGenerator[tuple[str, Result | None], None]:
        """Final text so far, and the result with the last."""
        deadline = max(0.0, self.due - time.monotonic())
        if not self.streamed:
            result = await self.refiner.refine(request, options, deadline=deadline)
            yield result.text or "", result
            return
        async with aclosing(self.refiner.stream(request, options, deadline=deadline)) as iterates:
            async for iterate in iterates:
                yield iterate.converged_text or "", iterate.result
