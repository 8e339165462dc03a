"""A draft that may still be arriving, as tokens that will not change any more."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from engine.async_refiner import AsyncRefiner
from engine.options import RefineOptions

NO_END_OF_TURN = 2**31
"""As keep_prefix: a draft as text gets an end of the turn behind it, unless all of it is kept."""
FEWEST_READ, LONGEST_WORD = 16, 32
"""Characters read before the text is tokenised again, and held back behind the last space."""


class Draft:
    """Text from ``source``, in the refiner's tokens behind a chat; read only as far as somebody asks for."""

    def __init__(
        self,
        refiner: AsyncRefiner,
        messages: list[dict[str, str]],
        options: RefineOptions,
        source: AsyncGenerator[str, None],
    ) -> None:
        self.text = ""
        self.complete = False
        """Whether all of it has arrived."""
        self._refiner, self._source = refiner, source
        self._request: dict[str, Any] = {"messages": messages}
        self._options = replace(options, condition=None)
        self._tokens: list[int] = []
        self._settled = False

    async def at_least(self, count: int) -> list[int]:
        """Waits for so many tokens, or for the end of the draft, and gives all there are by then."""
        while not self._settled and len(self._tokens) < count:
            # a token mostly has several characters: before that many have come there is no use in another look
            if not self.complete:
                await self._read(max(FEWEST_READ, count - len(self._tokens)))
            self._tokens = await self._encode()
            self._settled = self.complete
        return self._tokens

    async def whole(self) -> str:
        """Waits for the end of the draft."""
        while not self.complete:
            await self._read(1 << 30)
        return self.text

    def settle(self, token_ids: list[int]) -> None:
        """Has all of it, in these tokens."""
        self.complete = self._settled = True
        self._tokens = token_ids

    async def _read(self, characters: int) -> None:
        wanted = len(self.text) + characters
        parts = [self.text]
        size = len(self.text)
        while size < wanted:
            try:
                part = await anext(self._source)
            except StopAsyncIteration:
                self.complete = True
                break
            parts.append(part)
            size += len(part)
        self.text = "".join(parts)

    async def _encode(self) -> list[int]:
        if self.complete:
            return await self._ids(self.text, self._options)
        open_ended = replace(self._options, keep_prefix=NO_END_OF_TURN)
        present = await self._ids(self.text, open_ended)
        # the last word may go on, and the tokens of what stands before it may depend on how
        before = await self._ids(_without_last_word(self.text), open_ended)
        settled = next((i for i, (a, b) in enumerate(zip(before, present, strict=False)) if a != b), len(before))
        return before[:settled]

    async def _ids(self, text: str, options: RefineOptions) -> list[int]:
        _, ids = await asyncio.to_thread(self._refiner.encode, {**self._request, "draft": text}, options)
        return ids


def _without_last_word(text: str) -> str:
    """Of scripts without spaces all but the last characters."""
    text = text.rstrip()
    space = max(text.rfind(" "), text.rfind("\n"))
    return text[: max(space, len(text) - LONGEST_WORD, 0)]
