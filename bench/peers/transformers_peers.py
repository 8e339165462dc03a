"""Peers that run on the transformers modules of the same weights: their ``generate``, and the public script's loop."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from bench.baselines import full_reforward_jacobi, greedy_generate
from bench.peers.answer import Answer, Cost, answer_in, behind_drafts, with_draft
from engine.request import Request
from engine.text import TextCodec


class Passes:
    """Counts forward passes of a module, and the positions of each row in them."""

    def __init__(self) -> None:
        self.steps = self.positions = 0

    def add(self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.steps += 1
        self.positions += ids.shape[1]


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[Passes]:
    """Counts the passes inside."""
    passes = Passes()
    handle = model.register_forward_pre_hook(passes.add, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


class Generate:
    """Greedy ``generate``; with ``prompt_lookup_num_tokens`` it is transformers' prompt lookup, for one request at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        codec: TextCodec,
        tokens: int,
        *,
        condition: str | None = None,
        takes_draft: bool = False,
        **options: Any,
    ) -> None:
        """``condition``: a template by which the prompt shows the draft, as in ``RefineOptions``."""
        self.takes_draft = takes_draft
        self.largest_batch = 1 if "prompt_lookup_num_tokens" in options else None
        self._model, self._codec, self._tokens = model, codec, tokens
        self._condition, self._options = condition, options

    def answer(self, requests: Sequence[Request], drafts: Sequence[Answer] = ()) -> list[Answer]:
        start = time.perf_counter()
        given = list(requests)
        if self.takes_draft:
            given = [with_draft(request, draft) for request, draft in zip(requests, drafts, strict=True)]
        prompts = [self._codec.encode(request, self._condition)[0] for request in given]
        with counted(self._model) as passes:
            texts = greedy_generate(self._model, prompts, self._tokens, self._codec.vocabulary.pad, **self._options)
        seconds = time.perf_counter() - start
        answers = []
        for index, ids in enumerate(texts):
            before = behind_drafts(drafts, index) if self.takes_draft else Cost()
            answers.append(finished(ids, self._codec, before, seconds, passes))
        return answers


class PublicLoop:
    """The public DiffPO script's loop, run until nothing changes: one request at a time, a whole forward pass per step."""

    takes_draft = True
    largest_batch: int | None = 1

    def __init__(self, model: PreTrainedModel, codec: TextCodec, tokens: int) -> None:
        self._model, self._codec, self._tokens = model, codec, tokens

    def answer(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> list[Answer]:
        [request], [draft] = requests, drafts
        start = time.perf_counter()
        vocabulary = self._codec.vocabulary
        prompt, guess = self._codec.encode(with_draft(request, draft), None)
        with counted(self._model) as passes:
            ids, _ = full_reforward_jacobi(self._model, prompt, guess, self._tokens, vocabulary.pad, vocabulary.eos)
        return [finished(ids, self._codec, behind_drafts(drafts, 0), time.perf_counter() - start, passes)]


def finished(ids: list[int], codec: TextCodec, before: Cost, seconds: float, passes: Passes) -> Answer:
    """An answer of the refiner, behind what came ``before`` and some passes in so many seconds."""
    cost = Cost(
        draft=before.draft,
        refinement=seconds,
        token_forwards=before.token_forwards + passes.positions,
        sequential_steps=before.sequential_steps + passes.steps,
    )
    return answer_in(codec, ids, cost)
