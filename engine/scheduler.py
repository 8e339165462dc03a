"""Continuous batching: at every step finished sequences leave, waiting ones enter, and what runs is packed together."""

import logging
from collections import deque

import torch
from torch import Tensor

from engine.batch import Feed, StepBatch
from engine.device_loop import DeviceLoop
from engine.errors import EngineDead, EngineError, OutOfMemory, failures
from engine.jacobi import JacobiSequence
from engine.kernels import linear_argmax, linear_sample
from engine.kv_cache import KVCache, pages_for
from engine.model import CausalModel
from engine.sampling import sample
from engine.stream_order import StreamOrder

logger = logging.getLogger("engine.scheduler")

PASSES_TO_RECOVER = 32
"""Forward passes in a row that succeed with fewer rows, before twice as many are tried."""
CAPTURE_ERRORS = range(900, 909)
"""CUDA's codes for a call that some stream's capture does not allow, cudaErrorStreamCaptureUnsupported and those behind it: the
call has failed, and the device goes on."""


class Scheduler:
    """Runs sequences to their end on one model and one KV cache. Not thread-safe: one caller at a time.

    With a ``loop`` it computes the prompts of those that the loop takes, and leaves the rest of their way to it.
    """

    def __init__(
        self,
        model: CausalModel,
        cache: KVCache,
        max_batch_tokens: int,
        max_batch_size: int,
        loop: DeviceLoop | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_size = max_batch_size
        self.loop = loop
        self._order = StreamOrder(model.device)
        self.waiting: deque[JacobiSequence] = deque()
        self.running: deque[JacobiSequence] = deque()
        self.looping: list[JacobiSequence] = []
        self._restarted: set[JacobiSequence] = set()  # after the loop failed: they stay out of it
        self._rows = max_batch_tokens  # of the next pass: fewer than max_batch_tokens after one that failed
        self._passes = 1  # that have succeeded since then

    @property
    def load(self) -> int:
        """Sequences waiting or running, here or in the loop."""
        return len(self.waiting) + len(self.running) + len(self.looping)

    def add(self, sequence: JacobiSequence) -> None:
        """Queues a sequence; it must fit the pool when that is empty."""
        assert pages_for(sequence.longest) <= self.cache.pool.size
        self.waiting.append(sequence)

    def cancel(self, sequence: JacobiSequence) -> None:
        """Drops a sequence, wherever it is; its pages are free at once."""
        for queue in (self.waiting, self.running, self.looping):
            if sequence in queue:
                queue.remove(sequence)
        if self.loop:
            self._order.enter()
            self.loop.drop(sequence)
        self._release(sequence)

    def step(self) -> list[JacobiSequence]:
        """One forward pass over what fits, one step of the loop; returns what ended, in their order of arrival."""
        self._order.enter()
        self._admit()
        moved = self._advance(self._plan())
        done = self._take_ended(self.running)
        # whoever did not fit into this pass is first in the next; after a failed one its first half is tried by itself
        self.running.rotate(-sum(not sequence.finish_reason for sequence, _ in moved))
        if self.loop:
            self._step_loop(self.loop)
            done = self._take_ended(self.looping) + done
        return done

    def check_integrity(self) -> None:
        """Raises AssertionError if a page is lost or has two owners."""
        self.cache.pool.check_integrity([s.pages for s in (*self.looping, *self.running, *self.waiting)])

    def close(self) -> None:
        """Waits for what was launched and frees what the loop keeps beside the cache."""
        self._order.wait()
        if self.loop:
            self.loop.close()

    def _admit(self) -> None:
        while self.waiting and len(self.running) + len(self.looping) < self.max_batch_size:
            # the whole answer's pages are reserved on entry: a running sequence never has to be put back
            pages = self.cache.pool.allocate(pages_for(self.waiting[0].longest))
            if pages is None:
                return
            sequence = self.waiting.popleft()
            sequence.pages = pages
            self.running.append(sequence)

    def _release(self, sequence: JacobiSequence) -> None:
        self._restarted.discard(sequence)
        self.cache.pool.release(sequence.pages)
        sequence.pages = []

    def _plan(self) -> list[tuple[JacobiSequence, Feed]]:
        budget = self._rows
        active = [s for s in self.running if not s.finish_reason]
        feeds = []
        for i, sequence in enumerate(active):
            # one row is kept for each of the others, so that everyone moves as long as there are rows at all
            rows = budget - min(len(active) - i - 1, budget - 1)
            feed = sequence.plan_prefill(rows) if self._loops(sequence) else sequence.plan(rows, len(active))
            if feed is None:
                continue
            feeds.append((sequence, feed))
            budget -= len(feed.tokens)
            if budget <= 0:
                break
        return feeds

    def _loops(self, sequence: JacobiSequence) -> bool:
        return self.loop is not None and sequence not in self._restarted and self.loop.takes(sequence)

    def _step_loop(self, loop: DeviceLoop) -> None:
        ready = [s for s in self.running if self._loops(s) and s.plan_prefill(1) is None]
        for sequence in ready:
            self.running.remove(sequence)
            self.looping.append(sequence)
            loop.add(sequence)
        try:
            loop.step()
        except failures() as error:
            _check_device(error)
            self._restart(loop, error)

    def _restart(self, loop: DeviceLoop, error: Exception) -> None:
        """Whoever was in a loop that failed begins anew outside it: there a failed pass ends nobody but who fails alone."""
        logger.warning("a step of the device loop failed; its %d sequences begin anew: %s", len(self.looping), error)
        loop.clear()
        unfinished = [sequence for sequence in self.looping if not sequence.finish_reason]
        for sequence in unfinished:
            self.looping.remove(sequence)
            sequence.begin_anew()
        self._restarted.update(unfinished)
        self.running.extendleft(reversed(unfinished))

    def _take_ended(self, queue: deque[JacobiSequence] | list[JacobiSequence]) -> list[JacobiSequence]:
        ended = [sequence for sequence in queue if sequence.finish_reason]
        for sequence in ended:
            queue.remove(sequence)
            self._release(sequence)
        return ended

    def _advance(self, feeds: list[tuple[JacobiSequence, Feed]]) -> list[tuple[JacobiSequence, Feed]]:
        """Runs the pass; the feeds that moved their sequences: all, or none where it failed."""
        if not feeds:
            return []
        try:
            batch = StepBatch.pack([feed for _, feed in feeds], self.model.device)
            predictions = self._predict(batch, feeds)
        except failures() as error:
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
        _check_device(error)
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
        if hidden.shape[0] == 0:
            return []
        head = self.model.head
        if all(s.options.temperature == 0 for s, _ in feeds):
            return _ids(linear_argmax(hidden, head.weight, head.bias, softcap=head.softcap)[0])
        temperature, seeds, positions = _noise_of_rows(feeds, hidden.device)
        if all(s.options.top_p == 1 or s.options.temperature == 0 for s, _ in feeds):
            return _ids(
                linear_sample(
                    hidden, head.weight, head.bias, temperature=temperature, seeds=seeds, positions=positions,
                    softcap=head.softcap,
                )[0]
            )  # fmt: skip
        predictions: list[int] = []
        for sequence, feed in feeds:
            rows = slice(len(predictions), len(predictions) + len(feed.tokens) - feed.logit_start)
            how = sequence.options.temperature, sequence.options.top_p
            predictions += _ids(sample(hidden[rows], head, seeds[rows], positions[rows], *how))
        return predictions


def _noise_of_rows(feeds: list[tuple[JacobiSequence, Feed]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Temperature, seed and response position of every row that is predicted."""
    temperature: list[float] = []
    seeds: list[int] = []
    positions: list[int] = []
    for sequence, feed in feeds:
        count = len(feed.tokens) - feed.logit_start
        first = feed.position + feed.logit_start + 1 - len(sequence.prompt)
        temperature += [sequence.options.temperature] * count
        seeds += [sequence.seed] * count
        positions += range(first, first + count)
    return (
        torch.tensor(temperature, dtype=torch.float32, device=device),
        torch.tensor(seeds, dtype=torch.int64, device=device),
        torch.tensor(positions, dtype=torch.int64, device=device),
    )


def _check_device(error: Exception) -> None:
    """Raises EngineDead where nothing on the device can go on."""
    if not isinstance(error, torch.AcceleratorError) or "out of memory" in str(error):
        return
    if getattr(error, "error_code", None) not in CAPTURE_ERRORS:
        raise EngineDead(f"the device failed: {error}; start a new process") from error


def _typed(error: Exception) -> EngineError:
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    kind = OutOfMemory if out_of_memory else EngineError
    failed = kind(f"the forward pass failed: {type(error).__name__}: {error}; try a smaller max_batch_tokens or batch")
    failed.__cause__ = error
    return failed


def _ids(tokens: Tensor) -> list[int]:
    ids: list[int] = tokens.tolist()
    return ids
