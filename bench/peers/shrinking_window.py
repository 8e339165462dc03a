"""Jacobi decoding as Consistency LLM does it (Kou et al. 2024, arXiv 2403.00835), written anew.

The answer is made in blocks of n tokens. A block starts at its first token, which is known, and n - 1 guesses; every step
feeds what is left of it and drops what has become final, so the window shrinks until a step changes nothing. That step also
predicts the first token of the next block. Greedy, so the result is that of decoding token by token.
"""

import random
import time
from collections.abc import Sequence

from bench.peers.answer import Answer, Cost, answer_in, behind_drafts, with_draft
from bench.peers.cached import CachedModel
from engine import Refiner, Request
from engine.batch import Feed
from engine.kv_cache import pages_for

BLOCK = 16
"""n in the authors' evaluation."""


class ShrinkingWindow:
    """The loop over the engine's decoder and cache, any number of sequences side by side. Where theirs has a block computed to
    its end, this one stops at an EOS or the limit of tokens."""

    largest_batch: int | None = None

    def __init__(self, refiner: Refiner, tokens: int, *, takes_draft: bool, block: int = BLOCK) -> None:
        """``takes_draft``: guesses are the draft's tokens in their places; else drawn from the prompt and the answer so far,
        as Consistency LLM does."""
        self.takes_draft, self.tokens, self.block = takes_draft, tokens, block
        self._model = CachedModel(refiner)

    def answer(self, requests: Sequence[Request], drafts: Sequence[Answer] = ()) -> list[Answer]:
        model = self._model
        start = time.perf_counter()
        rows = [self._sequence(request, drafts, index) for index, request in enumerate(requests)]
        model.make_room(sum(pages_for(row.positions) for row in rows))
        for row in rows:
            row.pages = model.allocate(row.positions)
        running, seconds = list(enumerate(rows)), [0.0] * len(rows)
        while running:
            feeds = [row.feed() for _, row in running]
            predictions = model.argmax(model.feed(feeds))
            at = 0
            for (index, row), feed in zip(running, feeds, strict=True):
                count = len(feed.tokens) - feed.logit_start
                row.take(feed, predictions[at : at + count])
                at += count
                seconds[index] = time.perf_counter() - start
            running = [(index, row) for index, row in running if not row.ended()]
        for row in rows:
            model.release(row.pages)
        return [
            self._answer(row, behind_drafts(drafts, index) if self.takes_draft else Cost(), seconds[index])
            for index, row in enumerate(rows)
        ]

    def _sequence(self, request: Request, drafts: Sequence[Answer], index: int) -> "_Sequence":
        vocabulary = self._model.vocabulary
        if not self.takes_draft:
            prompt = self._model.prompt(request)
            return _Sequence(prompt, None, self.tokens, self.block, vocabulary.eos, vocabulary.pad)
        prompt, draft = self._model.codec.encode(with_draft(request, drafts[index]), None)
        return _Sequence(prompt, draft, self.tokens, self.block, vocabulary.eos, vocabulary.pad)

    def _answer(self, row: "_Sequence", before: Cost, seconds: float) -> Answer:
        cost = Cost(
            draft=before.draft,
            refinement=seconds,
            token_forwards=before.token_forwards + row.fed,
            sequential_steps=before.sequential_steps + row.steps,
        )
        return answer_in(self._model.codec, row.result(), cost)


class _Sequence:
    """One answer between steps: final tokens, then the point, whose first token is final too."""

    def __init__(
        self, prompt: list[int], draft: list[int] | None, limit: int, block: int, eos: frozenset[int], pad: int
    ) -> None:
        self.prompt, self.draft, self.limit, self.block, self.eos, self.pad = prompt, draft, limit, block, eos, pad
        self.pages: list[int] = []
        self.final: list[int] = []
        self.point: list[int] = []
        self.steps = self.fed = 0
        self._random = random.Random(0)

    @property
    def positions(self) -> int:
        return len(self.prompt) + self.limit

    def feed(self) -> Feed:
        if not self.point:
            return Feed(self.prompt, 0, self.pages, len(self.prompt) - 1)
        return Feed(self.point, len(self.prompt) + len(self.final), self.pages, 0)

    def take(self, feed: Feed, predictions: list[int]) -> None:
        """The predictions behind the prompt, or behind every token of the point."""
        self.steps += 1
        self.fed += len(feed.tokens)
        if not self.point:
            self.point = self._new_block(predictions[0])
            return
        after = [self.point[0], *predictions[:-1]]
        wrong = next((i for i, (a, b) in enumerate(zip(self.point, after, strict=True)) if a != b), None)
        if wrong is None:
            self.final += self.point
            self.point = self._new_block(predictions[-1])
        else:
            self.final += after[:wrong]
            self.point = after[wrong:]

    def ended(self) -> bool:
        known = self.result()
        return len(known) == self.limit or (bool(known) and known[-1] in self.eos)

    def result(self) -> list[int]:
        """What is known, up to EOS and the limit."""
        known = (self.final + self.point[:1])[: self.limit]
        end = next((i for i, token in enumerate(known) if token in self.eos), len(known))
        return known[: end + 1]

    def _new_block(self, first: int) -> list[int]:
        size = max(1, min(self.block, self.limit - len(self.final)))
        begin = len(self.final) + 1
        if self.draft is None:
            guesses = self._random.choices(self.prompt + self.final, k=size - 1)
        else:
            guesses = self.draft[begin : begin + size - 1]
        return [first, *guesses, *[self.pad] * (size - 1 - len(guesses))]
