"""Best-of-n: n samples of a model, of which the reward model chooses one."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bench.peers.answer import Answer, Cost, answer_in
from bench.peers.cached import CachedModel, shared_positions
from bench.peers.reward import Scorer
from engine import Refiner, Request
from engine.batch import Feed
from engine.kv_cache import pages_for

AT_ONCE = 128
"""Samples that run at once: on a CPU more are no faster, as a pass costs nearly what its rows do."""


@dataclass(slots=True)
class _Sample:
    request: int
    prompt: list[int]
    shared: list[int]
    """Pages of the prompt that all samples of the request read."""
    valid: int
    """Positions whose K/V is in the cache."""
    uniforms: list[float]
    """One number in [0, 1) per token."""
    own: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    fed: int = 0

    def feed(self) -> Feed:
        rows = (self.prompt + self.tokens)[self.valid :]
        return Feed(rows, self.valid, self.shared + self.own, len(rows) - 1)


class BestOfN:
    """Samples share the pages of their prompt, enter as others end and leave at EOS; the first of the best is the answer."""

    takes_draft = False
    largest_batch: int | None = None

    def __init__(
        self, model: Refiner, scorer: Scorer, tokens: int, *, n: int, temperature: float = 1.0, seed: int = 0
    ) -> None:
        """``temperature`` > 0; sample i of a request draws with numbers of its own, made of ``seed``, the request's seed
        and i."""
        self.n, self.temperature, self.tokens, self.seed = n, temperature, tokens, seed
        self._model, self._scorer = CachedModel(model), scorer

    def answer(self, requests: Sequence[Request], drafts: Sequence[Answer] = ()) -> list[Answer]:
        start = time.perf_counter()
        samples, prefixes = self.sample(requests)
        drawn = time.perf_counter()
        tokens_before = self._scorer.tokens
        pairs = [(requests[sample.request], sample.tokens) for sample in samples]
        rewards = self._scorer.score([request for request, _ in pairs], [tokens for _, tokens in pairs])
        scored = time.perf_counter()
        reward_tokens = round((self._scorer.tokens - tokens_before) / len(requests))
        answers = []
        for index, prefix in enumerate(prefixes):
            own = [i for i, sample in enumerate(samples) if sample.request == index]
            best = max(own, key=lambda i: rewards[i])
            cost = Cost(
                draft=drawn - start,
                reward=scored - drawn,
                token_forwards=prefix + sum(samples[i].fed for i in own),
                sequential_steps=(prefix > 0) + max(len(samples[i].tokens) for i in own) + 1,
                reward_tokens=reward_tokens,
            )
            answers.append(answer_in(self._model.codec, samples[best].tokens, cost))
        return answers

    def sample(self, requests: Sequence[Request]) -> tuple[list[_Sample], list[int]]:
        """``n`` samples of every request, and how many positions of its prompt were fed once for all of them."""
        model = self._model
        prompts = [model.prompt(request) for request in requests]
        prefixes = [shared_positions(prompt) for prompt in prompts]
        longest = max(map(len, prompts)) + self.tokens
        model.make_room(pages_for(sum(prefixes)) + min(AT_ONCE, self.n * len(requests)) * pages_for(longest))
        shared = [model.allocate(prefix) for prefix in prefixes]
        common = [
            Feed(prompt[:prefix], 0, pages, prefix)
            for prompt, prefix, pages in zip(prompts, prefixes, shared, strict=True)
            if prefix
        ]
        if common:
            model.feed(common)
        samples = [
            _Sample(index, prompt, shared[index], prefixes[index], self._uniforms(requests[index].seed or 0, number))
            for index, prompt in enumerate(prompts)
            for number in range(self.n)
        ]
        self._run(deque(samples))
        for pages in shared:
            model.release(pages)
        return samples, prefixes

    def _run(self, waiting: deque[_Sample]) -> None:
        model, running = self._model, list[_Sample]()
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                sample = waiting.popleft()
                sample.own = model.allocate(len(sample.prompt) + self.tokens - sample.valid)
                running.append(sample)
            feeds = [sample.feed() for sample in running]
            drawn = self._draw(model.logits(model.feed(feeds)), [s.uniforms[len(s.tokens)] for s in running])
            for sample, feed, token in zip(running, feeds, drawn, strict=True):
                sample.valid += len(feed.tokens)
                sample.fed += len(feed.tokens)
                sample.tokens.append(token)
                if self._ended(sample):
                    model.release(sample.own)
            running = [sample for sample in running if not self._ended(sample)]

    def _ended(self, sample: _Sample) -> bool:
        return len(sample.tokens) == self.tokens or sample.tokens[-1] in self._model.vocabulary.eos

    def _draw(self, logits: Tensor, uniforms: list[float]) -> list[int]:
        """Exact samples by inverting the cumulative distribution."""
        cumulative = (logits.double() / self.temperature).softmax(-1).cumsum(-1)
        thresholds = torch.tensor(uniforms, dtype=torch.float64)[:, None] * cumulative[:, -1:]
        tokens: list[int] = torch.searchsorted(cumulative, thresholds, right=True).flatten().tolist()
        return [min(token, logits.shape[1] - 1) for token in tokens]

    def _uniforms(self, seed: int, number: int) -> list[float]:
        values: list[float] = np.random.default_rng([self.seed, seed, number]).random(self.tokens).tolist()
        return values
