"""Continuous batching: at every step finished sequences leave, waiting ones enter, and what runs is packed together."""

from collections import deque

import torch
from torch import Tensor

from engine.batch import Feed, StepBatch
from engine.errors import EngineDead, EngineError, OutOfMemory
from engine.jacobi import JacobiSequence
from engine.kernels import linear_argmax
from engine.kv_cache import KVCache, pages_for
from engine.model import CausalModel
from engine.sampling import sample

PASSES_TO_RECOVER = 32
"""Forward passes in a row that succeed with fewer rows, before twice as many are tried."""


class Scheduler:
    """Runs sequences to their end on one model and one KV cache. Not thread-safe: one caller at a time."""

    def __init__(self, model: CausalModel, cache: KVCache, max_batch_tokens: int, max_batch_size: int) -> None:
        self.model = model
        self.cache = cache
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_size = max_batch_size
        self.waiting: deque[JacobiSequence] = deque()
        self.running: deque[JacobiSequence] = deque()
        self._rows = max_batch_tokens  # of the next pass: fewer than max_batch_tokens after one that failed
        self._passes = 1  # that have succeeded since then

    @property
    def load(self) -> int:
        """Sequences waiting or running."""
        return len(self.waiting) + len(self.running)

    def add(self, sequence: JacobiSequence) -> None:
        """Queues a sequence; it must fit the pool when that is empty."""
        assert pages_for(sequence.longest) <= self.cache.pool.size
        self.waiting.append(sequence)

    def cancel(self, sequence: JacobiSequence) -> None:
        """Drops a sequence, wherever it is; its pages are free at once."""
        for queue in (self.waiting, self.running):
            if sequence in queue:
                queue.remove(sequence)
        self._release(sequence)

    def step(self) -> list[JacobiSequence]:
        """One forward pass over what fits; returns the sequences that ended, in their order of arrival."""
        self._admit()
        moved = self._advance(self._plan())
        done = [s for s in self.running if s.finish_reason]
        for sequence in done:
            self.running.remove(sequence)
            self._release(sequence)
        # whoever did not fit into this pass is first in the next; after a failed one its first half is tried by itself
        self.running.rotate(-sum(not sequence.finish_reason for sequence, _ in moved))
        return done

    def check_integrity(self) -> None:
        """Raises AssertionError if a page is lost or has two owners."""
        self.cache.pool.check_integrity([s.pages for s in (*self.running, *self.waiting)])

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch_size:
            # the whole answer's pages are reserved on entry: a running sequence never has to be put back
            pages = self.cache.pool.allocate(pages_for(self.waiting[0].longest))
            if pages is None:
                return
            sequence = self.waiting.popleft()
            sequence.pages = pages
            self.running.append(sequence)

    def _release(self, sequence: JacobiSequence) -> None:
        self.cache.pool.release(sequence.pages)
        sequence.pages = []

    def _plan(self) -> list[tuple[JacobiSequence, Feed]]:
        budget = self._rows
        active = [s for s in self.running if not s.finish_reason]
        feeds = []
        for i, sequence in enumerate(active):
            # one row is kept for each of the others, so that everyone moves as long as there are rows at all
            rows = budget - min(len(active) - i - 1, budget - 1)
            feed = sequence.plan(rows, len(active))
            feeds.append((sequence, feed))
            budget -= len(feed.tokens)
            if budget <= 0:
                break
        return feeds

    def _advance(self, feeds: list[tuple[JacobiSequence, Feed]]) -> list[tuple[JacobiSequence, Feed]]:
        """Runs the pass; the feeds that moved their sequences: all, or none where it failed."""
        if not feeds:
            return []
        try:
            batch = StepBatch.pack([feed for _, feed in feeds], self.model.device)
            predictions = self._predict(batch, feeds)
        except (RuntimeError, MemoryError) as error:
            self._failed(feeds, error)
            return []
        self._recover()
        start = 0
        for sequence, feed in feeds:
            count = len(feed.tokens) - feed.logit_start
            sequence.advance(feed, predictions[start : start + count])
            start += count
        return feeds

    def _failed(self, feeds: list[tuple[JacobiSequence, Feed]], error: Exception) -> None:
        """It may be any one's doing, or only a matter of size: half the rows are tried next (what a sequence has is not
        touched, its next pass writes the same K/V again), until a single row fails twice in turn and ends its sequence."""
        if isinstance(error, torch.AcceleratorError) and "out of memory" not in str(error):
            raise EngineDead(f"the device failed: {error}; start a new process") from error
        rows = sum(len(feed.tokens) for _, feed in feeds)
        if rows > 1 or self._passes:
            self._rows, self._passes = max(1, rows // 2), 0
            return
        feeds[0][0].fail(_typed(error))
        self._rows = self.max_batch_tokens

    def _recover(self) -> None:
        self._passes += 1
        if self._rows < self.max_batch_tokens and self._passes >= PASSES_TO_RECOVER:
            self._rows, self._passes = min(2 * self._rows, self.max_batch_tokens), 0

    @torch.inference_mode()
    def _predict(self, batch: StepBatch, feeds: list[tuple[JacobiSequence, Feed]]) -> list[int]:
        hidden = self.model.forward(batch, self.cache)
        head = self.model.head
        if all(s.options.temperature == 0 for s, _ in feeds):
            return _ids(linear_argmax(hidden, head.weight, head.bias, softcap=head.softcap)[0])
        predictions: list[int] = []
        for sequence, feed in feeds:
            count = len(feed.tokens) - feed.logit_start
            rows = hidden[len(predictions) : len(predictions) + count]
            predictions += self._predict_one(rows, sequence, feed)
        return predictions

    def _predict_one(self, hidden: Tensor, sequence: JacobiSequence, feed: Feed) -> list[int]:
        head, options = self.model.head, sequence.options
        if options.temperature == 0 or hidden.shape[0] == 0:
            return _ids(linear_argmax(hidden.contiguous(), head.weight, head.bias, softcap=head.softcap)[0])
        first = feed.position + feed.logit_start + 1 - len(sequence.prompt)
        positions = torch.arange(first, first + hidden.shape[0], device=hidden.device)
        seeds = torch.full_like(positions, sequence.seed)
        return _ids(sample(hidden, head, seeds, positions, options.temperature, options.top_p))


def _typed(error: Exception) -> EngineError:
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    kind = OutOfMemory if out_of_memory else EngineError
    failed = kind(f"the forward pass failed: {type(error).__name__}: {error}; try a smaller max_batch_tokens or batch")
    failed.__cause__ = error
    return failed


def _ids(tokens: Tensor) -> list[int]:
    ids: list[int] = tokens.tolist()
    return ids
