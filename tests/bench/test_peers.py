"""Every peer against an independent computation, and its counters against counting by hand."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from bench.peers.answer import Answer, Cost, Peer
from bench.peers.best_of_n import BestOfN
from bench.peers.engine_peers import TOKEN_BY_TOKEN, BaseModel, EnginePeer
from bench.peers.lookahead import Lookahead
from bench.peers.reward_guided import RewardGuided
from bench.peers.shrinking_window import ShrinkingWindow
from bench.peers.transformers_peers import Generate, PublicLoop
from engine import DEFAULT_CONDITION, RefineOptions, Refiner, Request
from engine.jacobi import Vocabulary
from engine.kernels import PAGE_SIZE
from engine.text import TextCodec
from tests.engine.checkpoints import PAD, VOCABULARY, Oracle, family_model, prompts

TOKENS = 32
NAME = "llama"


class Stub:
    """A reward that is a function of the token ids; it counts answers."""

    def __init__(self, reward: Callable[[list[int]], float]) -> None:
        self.tokens = 0
        self._reward = reward

    def score(self, requests: Sequence[Request], answers: Sequence[list[int]]) -> list[float]:
        self.tokens += len(answers)
        return [self._reward(ids) for ids in answers]


def liking(ids: list[int]) -> float:
    """Some reward that changes with every token and its place."""
    return sum((token * 37 + place * 11) % 17 for place, token in enumerate(ids)) / 17


@pytest.fixture(scope="module")
def subject(oracle: Callable[[str], Oracle]) -> "tuple[Oracle, Refiner]":
    made = oracle(NAME)
    with Refiner.from_pretrained(made.folder, kv_cache_tokens=4096) as refiner:
        yield made, refiner


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return [Request(prompt_ids=ids, seed=number) for number, ids in enumerate(prompts(0, 5))]


@pytest.fixture(scope="module")
def drafts(subject: tuple[Oracle, Refiner], requests: list[Request]) -> list[Answer]:
    """Half right: every third token of the greedy answer is another one."""
    made, _ = subject
    answers = []
    for request in requests:
        greedy = made.greedy(request.prompt_ids or [], TOKENS)
        ids = [token if place % 3 else (token + 1) % VOCABULARY for place, token in enumerate(greedy)]
        answers.append(Answer(token_ids=ids, text=None, cost=Cost(draft=1.5, token_forwards=7, sequential_steps=3)))
    return answers


LOSSLESS: dict[str, Callable[[Oracle, Refiner], Peer]] = {
    "token by token": lambda _, r: EnginePeer(r, TOKEN_BY_TOKEN, TOKENS, takes_draft=False),
    "no draft": lambda _, r: EnginePeer(r, RefineOptions(), TOKENS, takes_draft=False),
    "refine": lambda _, r: EnginePeer(r, RefineOptions(), TOKENS, takes_draft=True),
    "generate": lambda o, r: Generate(o.model, r._codec, TOKENS),
    "prompt lookup": lambda o, r: Generate(o.model, r._codec, TOKENS, prompt_lookup_num_tokens=4),
    "public loop": lambda o, r: PublicLoop(o.model, r._codec, TOKENS),
    "shrinking window": lambda _, r: ShrinkingWindow(r, TOKENS, takes_draft=False, block=5),
    "shrinking window on drafts": lambda _, r: ShrinkingWindow(r, TOKENS, takes_draft=True),
    "lookahead": lambda o, r: Lookahead(o.model, r._codec, TOKENS),
    "lookahead, deep": lambda o, r: Lookahead(o.model, r._codec, TOKENS, window=3, ngram=5, candidates=2),
    "ARGS without its reward": lambda _, r: RewardGuided(r, Stub(liking), TOKENS, weight=0.0, candidates=3),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_peers_give_the_greedy_answer(
    name: str, subject: tuple[Oracle, Refiner], requests: list[Request], drafts: list[Answer]
) -> None:
    made, refiner = subject
    peer = LOSSLESS[name](made, refiner)
    size = peer.largest_batch or len(requests)
    answers = [
        answer
        for start in range(0, len(requests), size)
        for answer in peer.answer(requests[start : start + size], drafts[start : start + size])
    ]
    assert [a.token_ids for a in answers] == [made.greedy(r.prompt_ids or [], TOKENS) for r in requests]
    assert any(made.ends_with_eos(a.token_ids) for a in answers)
    assert any(len(a.token_ids) == TOKENS for a in answers)
    assert all((a.cost.draft == 1.5) == peer.takes_draft for a in answers if name != "ARGS without its reward")
    assert all(a.cost.seconds > 0 for a in answers)


def test_best_of_n_draws_what_inverting_the_distribution_gives(
    subject: tuple[Oracle, Refiner], requests: list[Request]
) -> None:
    made, refiner = subject
    peer = BestOfN(refiner, Stub(liking), TOKENS, n=3, temperature=0.7, seed=5)
    samples, _ = peer.sample(requests)
    for request, number in itertools.product(requests, range(3)):
        uniforms = np.random.default_rng([5, request.seed or 0, number]).random(TOKENS)
        expected: list[int] = []
        while len(expected) < TOKENS and not made.ends_with_eos(expected):
            scores = made.logits([*(request.prompt_ids or []), *expected])[-1].double() / 0.7
            below = scores.softmax(-1).cumsum(-1) <= uniforms[len(expected)]
            expected.append(int(below.sum()))
        own = [sample.tokens for sample in samples if sample.prompt == request.prompt_ids]
        assert own[number] == expected
    assert len({tuple(sample.tokens) for sample in samples}) == len(samples)


def test_best_of_n_draws_from_the_model_distribution(subject: tuple[Oracle, Refiner], requests: list[Request]) -> None:
    made, refiner = subject
    n = 4000
    samples, _ = BestOfN(refiner, Stub(liking), 1, n=n).sample(requests[1:2])
    expected = n * made.logits(requests[1].prompt_ids or [])[-1].double().softmax(-1)
    observed = torch.bincount(torch.tensor([s.tokens[0] for s in samples]), minlength=VOCABULARY).double()
    common = expected >= 5
    expected, observed = (torch.cat([x[common], x[~common].sum()[None]]) for x in (expected, observed))
    statistic = ((observed - expected).square() / expected.clamp_min(1e-9))[expected >= 5].sum().item()
    degrees = len(expected) - 1
    assert degrees > 10
    assert abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5  # five standard deviations of chi-square


def test_best_of_n_answers_with_the_largest_reward(subject: tuple[Oracle, Refiner], requests: list[Request]) -> None:
    _, refiner = subject
    peer = BestOfN(refiner, Stub(liking), 12, n=4, seed=1)
    samples, prefixes = peer.sample(requests)
    for index, answer in enumerate(peer.answer(requests)):
        own = [sample.tokens for sample in samples if sample.request == index]
        assert answer.token_ids == max(own, key=liking)
        prompt = len(requests[index].prompt_ids or [])
        assert prefixes[index] == (prompt - 1) // PAGE_SIZE * PAGE_SIZE
        assert answer.cost.token_forwards == prefixes[index] + sum(prompt - prefixes[index] + len(s) - 1 for s in own)
        assert answer.cost.sequential_steps == (prefixes[index] > 0) + max(map(len, own)) + 1
        assert answer.cost.reward_tokens == 4  # the stub counts answers
        assert answer.cost.draft > 0
        assert answer.cost.reward > 0
        assert answer.cost.refinement == 0
    assert BestOfN(refiner, Stub(lambda ids: 0.0), 12, n=4, seed=1).answer(requests)[0].token_ids == samples[0].tokens


def test_args_keeps_the_candidate_of_the_best_score(subject: tuple[Oracle, Refiner], requests: list[Request]) -> None:
    made, refiner = subject
    weight, candidates = 6.0, 4
    answers = RewardGuided(refiner, Stub(liking), TOKENS, weight=weight, candidates=candidates).answer(requests)
    for request, answer in zip(requests, answers, strict=True):
        expected: list[int] = []
        while len(expected) < TOKENS and not made.ends_with_eos(expected):
            logits = made.logits([*(request.prompt_ids or []), *expected])[-1]
            best = logits.argsort(descending=True)[:candidates].tolist()
            expected.append(max(best, key=lambda token: logits[token].item() + weight * liking([*expected, token])))
        assert answer.token_ids == expected
        assert answer.cost.token_forwards == len(request.prompt_ids or []) + len(expected) - 1
        assert answer.cost.sequential_steps == 2 * len(expected)
        assert answer.cost.reward_tokens == candidates * len(expected)
    greedy = [made.greedy(request.prompt_ids or [], TOKENS) for request in requests]
    assert [answer.token_ids for answer in answers] != greedy


def test_aligner_style_is_refine_with_a_condition() -> None:
    texts = [("How do I boil an egg?", "Put egg in in cold water."), ("Name a colour.", "")]
    requests = [Request(prompt=prompt) for prompt, _ in texts]
    drafts = [Answer(token_ids=[5], text=draft, cost=Cost(draft=0.5)) for _, draft in texts]
    with Refiner.from_pretrained() as refiner:
        given = [{"prompt": prompt, "draft": draft} for prompt, draft in texts]
        expected = refiner.refine(given, RefineOptions(condition=DEFAULT_CONDITION, max_new_tokens=16))
        unseen = refiner.refine(given, RefineOptions(max_new_tokens=16))
        for options in (RefineOptions(), TOKEN_BY_TOKEN):
            shown = RefineOptions(condition=DEFAULT_CONDITION, window=options.window, realign=options.realign)
            answers = EnginePeer(refiner, shown, 16, takes_draft=True).answer(requests, drafts)
            assert [a.token_ids for a in answers] == [r.token_ids for r in expected]
            assert [a.text for a in answers] == [r.text for r in expected]
            assert [a.cost.draft for a in answers] == [0.5, 0.5]
    assert [r.token_ids for r in unseen] != [r.token_ids for r in expected]


def test_stopping_after_k_steps_is_refine_with_steps(
    subject: tuple[Oracle, Refiner], requests: list[Request], drafts: list[Answer]
) -> None:
    _, refiner = subject
    given = [{"prompt_ids": r.prompt_ids, "draft_ids": d.token_ids} for r, d in zip(requests, drafts, strict=True)]
    for steps in (1, 2):
        expected = refiner.refine(given, RefineOptions(steps=steps, max_new_tokens=TOKENS, block_size=TOKENS))
        peer = EnginePeer(refiner, RefineOptions(steps=steps), TOKENS, takes_draft=True)
        answers = peer.answer(requests, drafts)
        assert [a.token_ids for a in answers] == [r.token_ids for r in expected]
        if steps == 1:
            rows = [len(r.prompt_ids or []) + TOKENS - 1 for r in requests]
            assert [a.cost.token_forwards for a in answers] == [7 + count for count in rows]
            assert [a.cost.sequential_steps for a in answers] == [3 + 1] * len(requests)


def long_case(made: Oracle, requests: list[Request]) -> tuple[Request, list[int]]:
    """A request whose greedy answer has TOKENS tokens, and that answer."""
    pairs = ((request, made.greedy(request.prompt_ids or [], TOKENS)) for request in requests)
    return next((request, answer) for request, answer in pairs if len(answer) == TOKENS)


def test_costs_counted_by_hand(subject: tuple[Oracle, Refiner], requests: list[Request]) -> None:
    made, refiner = subject
    codec = refiner._codec
    request, greedy = long_case(made, requests)
    prompt = len(request.prompt_ids or [])
    right = Answer(token_ids=greedy, text=None, cost=Cost(draft=2.0, token_forwards=10, sequential_steps=4))
    wrong = Answer(token_ids=[(t + 1) % VOCABULARY for t in greedy], text=None, cost=Cost())

    def cost(peer: Peer, draft: Answer = right) -> tuple[int, int]:
        [answer] = peer.answer([request], [draft])
        return answer.cost.token_forwards, answer.cost.sequential_steps

    one_by_one = (prompt + TOKENS - 1, TOKENS)
    assert cost(EnginePeer(refiner, TOKEN_BY_TOKEN, TOKENS, takes_draft=False)) == one_by_one
    assert cost(BaseModel(refiner, TOKENS)) == one_by_one
    assert cost(Generate(made.model, codec, TOKENS)) == one_by_one
    assert cost(Generate(made.model, codec, 1, prompt_lookup_num_tokens=4)) == (prompt, 1)
    # the draft's own 10 and 4, and one pass that changes nothing
    assert cost(PublicLoop(made.model, codec, TOKENS)) == (10 + prompt + TOKENS, 4 + 1)
    # of the prompt, then of each block, whose last pass predicts the next one's first token
    assert cost(ShrinkingWindow(refiner, TOKENS, takes_draft=True, block=16)) == (10 + prompt + 2 * 16, 4 + 3)
    # [t1 x x]: t2 is found; [t2 y]: t3 is found, which is all
    assert cost(ShrinkingWindow(refiner, 3, takes_draft=True, block=3), wrong) == (prompt + 3 + 2, 3)
    # W + N - 3 = 5 guesses beside the last token; then both levels of 5, less the one that is known by then
    assert cost(Lookahead(made.model, codec, 1)) == (prompt + 5, 1)
    assert cost(Lookahead(made.model, codec, 2)) == (prompt + 5 + 10, 2)
    [base] = BaseModel(refiner, TOKENS).answer([request])
    assert base.cost.draft == base.cost.seconds > 0


def test_lookahead_accepts_n_grams_that_it_found() -> None:
    """Where the next token depends on the last one alone, an answer soon goes in circles, which the window finds."""
    model = family_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=PAD)
    codec = TextCodec(None, Vocabulary(VOCABULARY, frozenset(), PAD))
    request = Request(prompt_ids=[7, 8, 9])
    [expected] = Generate(model, codec, 40).answer([request])
    [answer] = Lookahead(model, codec, 40).answer([request])
    assert answer.token_ids == expected.token_ids
    # the new tokens one by one, then an n-gram of three with every pass
    distinct = len(set(expected.token_ids))
    assert distinct < 30
    assert answer.cost.sequential_steps <= distinct + (40 - distinct) / 3 + 1


def test_a_draft_is_there_for_all_when_the_last_of_its_batch_is(
    subject: tuple[Oracle, Refiner], requests: list[Request]
) -> None:
    _, refiner = subject
    drafts = [
        Answer(token_ids=[5], text=None, cost=Cost(draft=seconds, token_forwards=number, sequential_steps=number))
        for number, seconds in enumerate([0.5, 3.0, 1.0])
    ]
    answers = EnginePeer(refiner, RefineOptions(steps=1), 4, takes_draft=True).answer(requests[:3], drafts)
    assert [a.cost.draft for a in answers] == [3.0] * 3
    assert [a.cost.token_forwards - len(r.prompt_ids or []) for a, r in zip(answers, requests, strict=False)] == [
        3,
        4,
        5,
    ]
