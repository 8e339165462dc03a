"""What a request gets does not depend on the requests beside it, to the last bit."""

import itertools
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig

from engine import RefineOptions, Refiner
from engine.batch import Feed, StepBatch
from engine.kernels import linear_argmax
from engine.kv_cache import KVCache, pages_for
from engine.model import CausalModel, Decoder
from tests.engine.checkpoints import FAMILIES, Oracle, prompts

CPU = torch.device("cpu")


class Table:
    """Sequences on one cache, fed in given pieces; every row's final hidden state is collected."""

    def __init__(self, model: CausalModel, texts: list[list[int]], pages: int = 64, shuffle: int | None = None) -> None:
        self.model, self.texts = model, texts
        self.cache: KVCache = model.new_cache(pages)
        free = list(range(pages))
        if shuffle is not None:
            random.Random(shuffle).shuffle(free)
        self.pages = [[free.pop() for _ in range(pages_for(len(text)))] for text in texts]
        self.fed = [0] * len(texts)
        self.rows: list[list[Tensor]] = [[] for _ in texts]

    def feed(self, counts: list[tuple[int, int]]) -> None:
        """(sequence, rows) pairs, packed in this order."""
        feeds = []
        for s, count in counts:
            feeds.append(Feed(self.texts[s][self.fed[s] : self.fed[s] + count], self.fed[s], self.pages[s], 0))
        hidden = self.model.forward(StepBatch.pack(feeds, CPU), self.cache)
        for (s, _), feed, rows in zip(counts, feeds, hidden.split([len(f.tokens) for f in feeds]), strict=True):
            self.fed[s] += len(feed.tokens)
            self.rows[s].append(rows)

    def hidden(self, sequence: int) -> Tensor:
        return torch.cat(self.rows[sequence])


@pytest.fixture(scope="module")
def decoder(oracle: Callable[[str], Oracle]) -> Callable[[str], Decoder]:
    made: dict[str, Decoder] = {}

    def get(name: str) -> Decoder:
        folder: Path = oracle(name).folder
        if name not in made:
            made[name] = Decoder.load(folder, AutoConfig.from_pretrained(folder), torch.float32, CPU)
        return made[name]

    return get


def alone(model: Decoder, text: list[int]) -> Tensor:
    table = Table(model, [text])
    table.feed([(0, len(text))])
    return table.hidden(0)


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_have_the_same_bits_alone_and_packed(name: str, decoder: Callable[[str], Decoder]) -> None:
    model, texts = decoder(name), [*prompts(5), [9] * 150]
    reference = [alone(model, text) for text in texts]

    @settings(max_examples=15, deadline=None)
    @given(st.randoms(use_true_random=False), st.integers(1, 40))
    def check(rng: random.Random, most: int) -> None:
        table = Table(model, texts, shuffle=rng.randrange(99))
        while left := [s for s, text in enumerate(texts) if table.fed[s] < len(text)]:
            chosen = rng.sample(left, rng.randint(1, len(left)))
            table.feed([(s, min(rng.randint(1, most), len(texts[s]) - table.fed[s])) for s in chosen])
        for s, expected in enumerate(reference):
            assert torch.equal(table.hidden(s), expected)
            heads = [linear_argmax(rows, model.head.weight, softcap=model.head.softcap) for rows in table.rows[s]]
            whole = linear_argmax(expected, model.head.weight, softcap=model.head.softcap)
            assert torch.equal(torch.cat([index for index, _ in heads]), whole[0])
            assert torch.equal(torch.cat([value for _, value in heads]), whole[1])

    check()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(
    name: str, decoder: Callable[[str], Decoder], oracle: Callable[[str], Oracle]
) -> None:
    """Within a few float32 roundings of the largest logit."""
    for text in prompts(7):
        head = decoder(name).head
        z = alone(decoder(name), text) @ head.weight.dense().T
        z = head.softcap * torch.tanh(z / head.softcap) if head.softcap else z
        expected = oracle(name).logits(text)
        assert (z - expected).abs().max() < 1e-4 * expected.abs().max()


def test_rewriting_behind_a_mismatch_equals_never_having_been_wrong(decoder: Callable[[str], Decoder]) -> None:
    for name, text in itertools.product(FAMILIES, prompts(3)[3:]):
        table = Table(decoder(name), [text + [8] * 30])
        table.feed([(0, len(text) + 30)])
        keep = len(text) // 2
        table.fed, table.rows, table.texts = [keep], [[table.rows[0][0][:keep]]], [text]
        table.feed([(0, len(text) - keep)])
        assert torch.equal(table.hidden(0), alone(decoder(name), text))


@pytest.mark.parametrize("options", [
    RefineOptions(max_new_tokens=30),
    RefineOptions(max_new_tokens=30, steps=3, block_size=11),
    RefineOptions(max_new_tokens=30, temperature=0.9, top_p=0.9, window=6),
], ids=["greedy", "steps", "sampled"])  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2-some-windows"])
def test_results_do_not_depend_on_company_or_order(
    name: str, options: RefineOptions, load: Callable[..., Refiner]
) -> None:
    requests = [
        {"prompt_ids": p, "draft_ids": d[:25], "id": i, "seed": i}
        for i, (p, d) in enumerate(itertools.product(prompts(1)[:4], prompts(2)[2:5]))
    ]
    reference = {}
    for request in requests:
        (result,) = load(name).refine([request], options)
        reference[request["id"]] = (result.token_ids, result.converged, result.finish_reason)
    rng = random.Random(3)
    for max_batch_size, max_batch_tokens in [(64, 2048), (1, 2048), (2, 5), (3, 64), (64, 1), (7, 30)]:
        order = rng.sample(requests, len(requests)) * 2
        results = load(name, max_batch_tokens, max_batch_size).refine(order, options)
        assert [result.id for result in results] == [request["id"] for request in order]
        for result in results:
            assert (result.token_ids, result.converged, result.finish_reason) == reference[result.id]


@pytest.mark.parametrize("window", ["auto", 6])
@pytest.mark.parametrize("concurrency", [1, 12])
def test_with_a_fixed_concurrency_steps_do_not_depend_on_company_either(
    concurrency: int, window: Literal["auto"] | int, load: Callable[..., Refiner]
) -> None:
    options = RefineOptions(max_new_tokens=40, concurrency=concurrency, window=window)
    plain = load("llama").refine([{"prompt_ids": p} for p in prompts(1)[:4]], options)
    # drafts that are right up to a point, so that windows grow and shrink
    requests = [
        {"prompt_ids": p, "draft_ids": [*r.token_ids[:cut], 3, *r.token_ids[cut + 1 :]], "id": 4 * i + cut}
        for i, (p, r) in enumerate(zip(prompts(1)[:4], plain, strict=True))
        for cut in (0, 2, 3)
    ]
    reference = {}
    for request in requests:
        (result,) = load("llama").refine([request], options)
        reference[request["id"]] = (result.token_ids, result.steps, result.forward_tokens)
    assert len({steps for _, steps, _ in reference.values()}) > 1
    rng = random.Random(4)
    for max_batch_size, max_batch_tokens in [(64, 2048), (2, 5), (3, 64), (64, 1), (7, 30)]:
        order = rng.sample(requests, len(requests)) * 2
        for result in load("llama", max_batch_tokens, max_batch_size).refine(order, options):
            assert (result.token_ids, result.steps, result.forward_tokens) == reference[result.id]


def test_long_texts_before_do_not_change_short_ones_after(checkpoint: Callable[[str], Path]) -> None:
    """The table of rotations grows on demand; its old rows keep their bits."""
    folder = checkpoint("qwen3")
    model = Decoder.load(folder, AutoConfig.from_pretrained(folder), torch.float32, CPU)
    text = prompts(4)[4]
    before, small = alone(model, text), weakref.ref(model.rotation)
    alone(model, [5] * 300)
    assert torch.equal(alone(model, text), before)
    assert small() is not None  # graphs captured by another engine on this model still read it
    assert len(model.rotation) >= 300
