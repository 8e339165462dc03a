"""Peers that are options of the engine: decoding token by token, refining a draft, showing it in the prompt."""

import time
from collections.abc import Sequence
from dataclasses import replace

from bench.peers.answer import Answer, Cost, answer_in, behind_drafts, with_draft
from engine import RefineOptions, Refiner, Request, Result

TOKEN_BY_TOKEN = RefineOptions(window=1, realign=False)


class EnginePeer:
    """Answers of a ``Refiner`` with some options; the whole batch is inside at once and each answer leaves as it ends."""

    largest_batch: int | None = None

    def __init__(self, refiner: Refiner, options: RefineOptions, tokens: int, *, takes_draft: bool) -> None:
        self.takes_draft = takes_draft
        self._refiner = refiner
        self._options = replace(options, max_new_tokens=tokens, block_size=tokens)

    def answer(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> list[Answer]:
        """Raises the first error of a result."""
        given = list(requests)
        if self.takes_draft:
            given = [with_draft(request, draft) for request, draft in zip(requests, drafts, strict=True)]
        answers: dict[int, Answer] = {}
        start = time.perf_counter()
        for result in self._refiner.stream(given, self._options, ordered=False):
            if result.error:
                raise result.error
            before = behind_drafts(drafts, result.index) if self.takes_draft else Cost()
            cost = _cost(result, before, time.perf_counter() - start)
            answers[result.index] = answer_in(self._refiner._codec, result.token_ids, cost)
        return [answers[index] for index in range(len(requests))]


class BaseModel:
    """The base model token by token: drafts, and the answer of those who leave it at that."""

    takes_draft = False
    largest_batch: int | None = None

    def __init__(self, base: Refiner, tokens: int) -> None:
        self._decoding = EnginePeer(base, TOKEN_BY_TOKEN, tokens, takes_draft=False)

    def answer(self, requests: Sequence[Request], drafts: Sequence[Answer] = ()) -> list[Answer]:
        answers = self._decoding.answer(requests, ())
        return [replace(a, cost=replace(a.cost, draft=a.cost.refinement, refinement=0.0)) for a in answers]


def _cost(result: Result, before: Cost, seconds: float) -> Cost:
    return replace(
        before,
        refinement=seconds,
        token_forwards=before.token_forwards + result.forward_tokens,
        sequential_steps=before.sequential_steps + result.steps,
    )
