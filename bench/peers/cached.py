"""Sequences in a KV cache of the engine's decoder, moved by hand: for peers whose loop is no option of the engine."""

import torch
from torch import Tensor

from engine import Refiner, Request
from engine.batch import Feed, StepBatch
from engine.jacobi import Vocabulary
from engine.kernels import PAGE_SIZE, linear_argmax
from engine.kernels.linear_argmax import logits
from engine.kv_cache import KVCache, pages_for
from engine.model import CausalModel


class CachedModel:
    """A refiner's decoder and tokenizer with a cache of its own, which is kept from one answer to the next and grows."""

    def __init__(self, refiner: Refiner) -> None:
        self.model: CausalModel = refiner._alive().model
        self.codec = refiner._codec
        self.vocabulary: Vocabulary = refiner._codec.vocabulary
        self._cache: KVCache | None = None

    def prompt(self, request: Request) -> list[int]:
        """The request's prompt in tokens, by the model's own chat template."""
        return self.codec.encode(request, None)[0]

    def make_room(self, pages: int) -> None:
        """Has at least so many pages, all of them free."""
        if self._cache is None or self._cache.pool.size < pages:
            self._cache = self.model.new_cache(pages)

    def allocate(self, positions: int) -> list[int]:
        """Pages for so many positions, to be given back."""
        assert self._cache is not None
        pages = self._cache.pool.allocate(pages_for(positions))
        assert pages is not None, "make_room was asked for too little"
        return pages

    def release(self, pages: list[int]) -> None:
        assert self._cache is not None
        self._cache.pool.release(pages)

    @torch.inference_mode()
    def feed(self, feeds: list[Feed]) -> Tensor:
        """One forward pass; hidden states [rows, hidden] of the rows whose prediction is wanted."""
        assert self._cache is not None
        return self.model.forward(StepBatch.pack(feeds, self.model.device), self._cache)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocabulary] float32."""
        head = self.model.head
        return logits(hidden, head.weight, head.bias, softcap=head.softcap)

    @torch.inference_mode()
    def argmax(self, hidden: Tensor) -> list[int]:
        """The most likely token of every row."""
        head = self.model.head
        tokens: list[int] = linear_argmax(hidden, head.weight, head.bias, softcap=head.softcap)[0].tolist()
        return tokens


def shared_positions(prompt: list[int]) -> int:
    """Leading positions of a prompt that lie in whole pages, without its last one, which predicts: copies of a sequence can
    share these pages."""
    return (len(prompt) - 1) // PAGE_SIZE * PAGE_SIZE
