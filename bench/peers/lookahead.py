"""Lookahead decoding (Fu et al. 2024, arXiv 2402.02057), written anew on the transformers modules: they have none.

A forward pass holds the last known token, a window of guesses and candidates. The window has N - 1 levels of W columns: level
j, column i stands i + j positions behind the known token, was predicted from level j - 1 of its column, and sees the known
text, level 0 up to its column and the levels between. What the last level predicts completes an n-gram per column; n-grams are
kept by their first token. Those that begin with the known token are the candidates: greedy decoding checks them in the same
pass, so the result is that of decoding token by token.
"""

import random
import time
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bench.peers.answer import Answer, Cost
from bench.peers.transformers_peers import counted, finished
from engine.request import Request
from engine.text import TextCodec

WINDOW, NGRAM, CANDIDATES = 5, 3, 5
"""W, N and the most candidates of a pass, so that it has at most 20 rows: the authors' 15, 5, 15 are for GPUs, on which more
rows are nearly free; on a CPU of few cores a pass costs nearly what its rows do from about eleven on."""


class Lookahead:
    """One request at a time, as with the authors; models whose layers all attend to everything before them."""

    takes_draft = False
    largest_batch: int | None = 1

    def __init__(
        self, model: PreTrainedModel, codec: TextCodec, tokens: int,
        *, window: int = WINDOW, ngram: int = NGRAM, candidates: int = CANDIDATES,
    ) -> None:  # fmt: skip
        """``window`` >= 1, ``ngram`` >= 3. Raises ValueError for a model with sliding windows."""
        if getattr(model.config, "sliding_window", None):
            raise ValueError(f"lookahead decoding needs full attention, {model.config.model_type} has sliding windows")
        self._model, self._codec, self._tokens = model, codec, tokens
        self._sizes = window, ngram, candidates

    @torch.inference_mode()
    def answer(self, requests: Sequence[Request], drafts: Sequence[Answer] = ()) -> list[Answer]:
        [request] = requests
        start = time.perf_counter()
        known = self._codec.encode(request, None)[0]
        window, cache, answer = LookaheadWindow(known, *self._sizes), DynamicCache(), list[int]()
        eos = self._codec.vocabulary.eos
        with counted(self._model) as passes:
            while len(answer) < self._tokens and not eos.intersection(answer):
                fresh = self._step(window, known, cache)
                answer += fresh
                known = fresh[-1:]
        answer = answer[: self._tokens]
        end = next((i + 1 for i, token in enumerate(answer) if token in eos), len(answer))
        return [finished(answer[:end], self._codec, Cost(), time.perf_counter() - start, passes)]

    def _step(self, window: "LookaheadWindow", known: list[int], cache: DynamicCache) -> list[int]:
        """The tokens that follow ``known``, whose K/V the cache does not hold yet; it then holds all but the last of them."""
        candidates = window.candidates(known[-1])
        rows = Rows(known)
        last_level = window.add_to(rows)
        tried = [rows.add_chain(candidate) for candidate in candidates]
        wanted = [rows.current, *last_level, *(row for chain in tried for row in chain)]
        predicted = dict(zip(wanted, self._predict(rows, wanted, cache), strict=True))
        fresh, accepted = [predicted[rows.current]], []
        for candidate, chain in zip(candidates, tried, strict=True):
            right = [predicted[rows.current], *(predicted[row] for row in chain)]
            hits = next((i for i, token in enumerate(candidate) if token != right[i]), len(candidate))
            if hits >= len(fresh):
                fresh, accepted = right[: hits + 1], chain[:hits]
        past = cache.get_seq_length() - len(rows.tokens)
        kept = torch.tensor([*range(past + len(known)), *(past + row for row in accepted)])
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
        window.advance(known[-1], [predicted[row] for row in last_level])
        return fresh

    def _predict(self, rows: "Rows", wanted: list[int], cache: DynamicCache) -> list[int]:
        past = cache.get_seq_length()
        logits: Tensor = self._model(
            input_ids=torch.tensor([rows.tokens]),
            position_ids=past + torch.tensor([rows.positions]),
            attention_mask=rows.mask(past),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor(wanted),
        ).logits
        tokens: list[int] = logits[0].argmax(-1).tolist()
        return tokens


class Rows:
    """The rows of a pass, each with its position behind what is cached and the rows it sees."""

    def __init__(self, known: list[int]) -> None:
        self.tokens = list(known)
        self.positions = list(range(len(known)))
        self.sees = [list(range(i + 1)) for i in range(len(known))]
        self.current = len(known) - 1

    def add(self, token: int, behind: int) -> int:
        """A row that stands after row ``behind`` and sees what that sees; its index."""
        index = len(self.tokens)
        self.tokens.append(token)
        self.positions.append(self.positions[behind] + 1)
        self.sees.append([*self.sees[behind], index])
        return index

    def add_chain(self, tokens: Sequence[int]) -> list[int]:
        """Rows of tokens that follow the last known one."""
        chain = [self.current]
        for token in tokens:
            chain.append(self.add(token, chain[-1]))
        return chain[1:]

    def mask(self, past: int) -> Tensor:
        """[1, 1, rows, past + rows] float32 to be added to scores."""
        mask = torch.full((len(self.tokens), past + len(self.tokens)), torch.finfo(torch.float32).min)
        mask[:, :past] = 0
        for row, seen in enumerate(self.sees):
            mask[row, [past + index for index in seen]] = 0
        return mask[None, None]


class LookaheadWindow:
    """The levels of guesses and the n-grams found so far."""

    def __init__(self, prompt: list[int], window: int, ngram: int, candidates: int) -> None:
        self._depth, self._most = ngram - 1, candidates
        # a column is given up with every step that adds a level; column 0 of level 0 is always the last known token
        self._levels = [random.Random(0).choices(prompt, k=window + self._depth - 1)]
        self._found: dict[int, list[tuple[int, ...]]] = defaultdict(list)

    def candidates(self, token: int) -> list[tuple[int, ...]]:
        """What may follow a token, n - 1 tokens each."""
        return list(self._found.get(token, ()))

    def add_to(self, rows: Rows) -> list[int]:
        """Adds the window's rows; those of the last level, one per column."""
        first = [rows.current]
        for token in self._levels[0][1:]:
            first.append(rows.add(token, first[-1]))
        last = first
        for level in self._levels[1:]:
            last = [rows.add(token, below) for token, below in zip(level, last, strict=True)]
        return last

    def advance(self, known: int, predicted: list[int]) -> None:
        """Takes what the last level predicts: a new level, and n-grams once there are all levels."""
        self._levels[0][0] = known
        levels = [*self._levels, predicted]
        if len(levels) <= self._depth:
            self._levels = [level[1:] for level in levels]
            return
        for first, *rest in zip(*levels, strict=True):
            kept = self._found[first]
            if tuple(rest) in kept:
                kept.remove(tuple(rest))
            kept.append(tuple(rest))  # the latest last, the oldest gives way
            del kept[: -self._most]
        self._levels = levels[1:]
