"""ARGS (Khanov et al. 2024, arXiv 2402.01694), written anew: the reward model has a say in every token.

At every step each of the k most likely tokens is tried behind the answer so far, and the one with the largest
``logit + weight * reward`` is kept (ARGS-greedy; as in the authors' code the logit is not normalised, which for the choice
among the candidates of one step is the same as the log-probability).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.peers.answer import Answer, Cost, answer_in
from bench.peers.cached import CachedModel
from bench.peers.reward import Scorer
from engine import Refiner, Request
from engine.batch import Feed
from engine.kv_cache import pages_for


@dataclass(slots=True)
class _Guided:
    request: Request
    prompt: list[int]
    pages: list[int]
    tokens: list[int] = field(default_factory=list)
    valid: int = 0
    reward_tokens: float = 0.0
    cost: Cost = field(default_factory=Cost)

    def feed(self) -> Feed:
        rows = (self.prompt + self.tokens)[self.valid :]
        return Feed(rows, self.valid, self.pages, len(rows) - 1)


class RewardGuided:
    """ARGS-greedy over the engine's decoder and cache; the candidates of a batch are scored together."""

    takes_draft = False
    largest_batch: int | None = None

    def __init__(self, base: Refiner, scorer: Scorer, tokens: int, *, weight: float, candidates: int) -> None:
        self.tokens, self.weight, self.candidates = tokens, weight, candidates
        self._model, self._scorer = CachedModel(base), scorer

    def answer(self, requests: Sequence[Request], drafts: Sequence[Answer] = ()) -> list[Answer]:
        model = self._model
        start = time.perf_counter()
        prompts = [model.prompt(request) for request in requests]
        model.make_room(sum(pages_for(len(prompt) + self.tokens) for prompt in prompts))
        pages = [model.allocate(len(prompt) + self.tokens) for prompt in prompts]
        running = answers = [_Guided(*parts) for parts in zip(requests, prompts, pages, strict=True)]
        rewarding = 0.0
        while running:
            rewarding += self._step(running)
            now = time.perf_counter() - start
            for one in running:
                steps = 2 * len(one.tokens)
                one.cost = Cost(
                    draft=now - rewarding, reward=rewarding, token_forwards=one.valid, sequential_steps=steps,
                    reward_tokens=round(one.reward_tokens),
                )  # fmt: skip
            running = [one for one in running if not self._ended(one)]
        for own in pages:
            model.release(own)
        return [answer_in(model.codec, one.tokens, one.cost) for one in answers]

    def _step(self, running: list[_Guided]) -> float:
        """Adds a token to everyone; the seconds that the reward model took."""
        feeds = [one.feed() for one in running]
        logits = self._model.logits(self._model.feed(feeds))
        top = logits.topk(min(self.candidates, logits.shape[1]), -1)
        start, before = time.perf_counter(), self._scorer.tokens
        tried = [
            (one.request, [*one.tokens, token])
            for one, row in zip(running, top.indices.tolist(), strict=True)
            for token in row
        ]
        rewards = self._scorer.score([request for request, _ in tried], [tokens for _, tokens in tried])
        seconds, read = time.perf_counter() - start, self._scorer.tokens - before
        chosen = (top.values + self.weight * top.values.new_tensor(rewards).view_as(top.values)).argmax(-1)
        tokens = top.indices.gather(1, chosen[:, None]).flatten().tolist()
        for one, feed, token in zip(running, feeds, tokens, strict=True):
            one.valid += len(feed.tokens)
            one.tokens.append(token)
            one.reward_tokens += read / len(running)
        return seconds

    def _ended(self, one: _Guided) -> bool:
        return len(one.tokens) == self.tokens or one.tokens[-1] in self._model.vocabulary.eos
