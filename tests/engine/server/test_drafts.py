"""A draft on its way, as tokens."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import AsyncRefiner, RefineOptions
from engine.server import drafts
from engine.server.drafts import Draft

MESSAGES = [{"role": "user", "content": "How do I boil an egg?"}]
WORDS = st.sampled_from(
    [
        "egg",
        "eggs",
        "boil",
        "boiling",
        "it's",
        "photosynthesis",
        "8",
        "1650",
        "—",
        "🥚",
        "水を沸かす",
        "\n",
        "\n\n",
        "-",
        "Re:",
    ]
)
TEXTS = st.lists(WORDS | st.text(max_size=6), max_size=12).map(" ".join)


async def pieces(text: str, size: int) -> AsyncGenerator[str, None]:
    for i in range(0, len(text), size):
        yield text[i : i + size]


@pytest.mark.parametrize("size", [1, 5])
@given(text=TEXTS, count=st.integers(1, 12))
def test_tokens_are_those_of_the_whole_draft(shared_refiner: AsyncRefiner, size: int, text: str, count: int) -> None:
    """Each look at a draft that still arrives shows its first tokens, which no later text changes."""

    async def look() -> None:
        whole = shared_refiner.encode({"messages": MESSAGES, "draft": text})[1]
        draft = Draft(shared_refiner, MESSAGES, RefineOptions(), pieces(text, size))
        tokens: list[int] = []
        while not draft.complete:
            wanted = len(tokens) + count
            tokens = await draft.at_least(wanted)
            assert tokens == whole[: len(tokens)]
            assert len(tokens) >= wanted or draft.complete
        assert await draft.at_least(10_000) == whole
        assert draft.text == await draft.whole() == text

    asyncio.run(look())


def test_only_as_much_is_read_as_is_asked_for(shared_refiner: AsyncRefiner) -> None:
    read = 0

    async def source() -> AsyncGenerator[str, None]:
        nonlocal read
        for _ in range(1000):
            read += 4
            yield "egg "

    async def look() -> None:
        draft = Draft(shared_refiner, MESSAGES, RefineOptions(), source())
        tokens = await draft.at_least(10)
        assert len(tokens) >= 10
        assert read <= 4 * len(tokens) + drafts.FEWEST_READ + drafts.LONGEST_WORD

    asyncio.run(look())
