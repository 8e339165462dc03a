"""Sampled mode draws what sequential sampling with the same numbers draws, and from the right distribution."""

import functools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import RefineOptions, Refiner
from engine.kernels import LinearWeight
from engine.kernels.gumbel_noise import gumbel_noise
from engine.model import Head
from engine.sampling import nucleus, sample
from tests.engine.checkpoints import FAMILIES, VOCABULARY, Oracle, prompts

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MAX_SEED = 2**63 - 1


def finalise(x: np.ndarray) -> np.ndarray:
    """splitmix64's output function (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def noise(seed: int, position: int, vocabulary: int) -> np.ndarray:
    """Gumbel noise of every token at one position, in 64-bit unsigned arithmetic."""
    with np.errstate(over="ignore"):
        key = finalise(finalise(np.uint64([seed]) + GOLDEN) + np.uint64([position]) * GOLDEN)
        bits = finalise(key + np.arange(1, vocabulary + 1, dtype=np.uint64) * GOLDEN) >> np.uint64(12)
    return -np.log(-np.log((bits.astype(np.float64) + 0.5) / 2.0**52))


def keep_nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """The most probable tokens, one by one, until their mass reaches top_p."""
    kept = np.zeros(len(probabilities), dtype=bool)
    mass = 0.0
    for token in sorted(range(len(probabilities)), key=lambda t: (-probabilities[t], t)):
        if mass >= top_p:
            break
        kept[token] = True
        mass += probabilities[token]
    return kept


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def draw(logits: np.ndarray, seed: int, position: int, temperature: float, top_p: float) -> int:
    z = logits.astype(np.float64) / temperature
    if top_p < 1:
        z = np.where(keep_nucleus(softmax(z), top_p), z, -np.inf)
    return int((z + noise(seed, position, len(z))).argmax())


class Sequential:
    """Position by position with transformers' logits; each (text, seed, ...) is continued once."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self.next = functools.cache(self._next)

    def _next(self, text: tuple[int, ...], position: int, seed: int, temperature: float, top_p: float) -> int:
        return draw(self.oracle.logits(list(text))[-1].numpy(), seed, position, temperature, top_p)

    def answer(self, prompt: list[int], seed: int, options: RefineOptions, kept: list[int]) -> list[int]:
        text = list(kept)
        while text and self.oracle.eos & set(text[:-1]):
            text.pop()
        while len(text) < options.max_new_tokens and not self.oracle.eos & set(text):
            text.append(self.next((*prompt, *text), len(text), seed, options.temperature, options.top_p))
        return text


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_sequential_sampling(name: str, oracle: Callable[[str], Oracle], load: Callable[..., Refiner]) -> None:
    sequential = Sequential(oracle(name))
    texts = prompts(1)[:4]

    @settings(max_examples=6, deadline=None)
    @given(
        st.sampled_from([(0.7, 1.0), (1.5, 0.8), (6.0, 0.5), (20.0, 1.0)]),
        st.one_of(st.just("auto"), st.integers(1, 30)),
        st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, MAX_SEED]), st.randoms()), min_size=1, max_size=3),
        st.sampled_from([1, 3, 20, 2048]),
        st.sampled_from([0, 0, 2]),
    )
    def check(how: tuple[float, float], window: int, cases: list[tuple], max_batch_tokens: int, keep: int) -> None:
        options = RefineOptions(
            temperature=how[0], top_p=how[1], window=window, max_new_tokens=18, keep_prefix=keep, seed=77
        )
        work = []
        for index, seed, rng in cases:
            draft = sequential.answer(texts[index], seed, options, [])
            for _ in range(rng.randint(0, 3)):
                draft.insert(rng.randrange(len(draft)), rng.randrange(4, VOCABULARY))
            work.append((texts[index], draft, seed))
        requests = [{"prompt_ids": p, "draft_ids": d, "seed": seed} for p, d, seed in work]
        for (prompt, draft, seed), result in zip(
            work, load(name, max_batch_tokens).refine(requests, options), strict=True
        ):
            assert result.token_ids == sequential.answer(prompt, seed, options, draft[:keep])
            assert result.converged

    check()


def test_the_seed_of_the_options_is_for_requests_without_one(load: Callable[..., Refiner]) -> None:
    def ids(seed: int, own: int | None) -> list[int]:
        options = RefineOptions(temperature=3.0, seed=seed, max_new_tokens=12)
        return load("llama").refine([{"prompt_ids": [5, 6], "seed": own}], options)[0].token_ids

    assert ids(1, None) == ids(2, 1) == ids(1, 1)
    assert ids(1, None) != ids(2, None)
    assert ids(1, 0) == ids(0, None)


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**40 + 3, MAX_SEED])
def test_noise_is_the_documented_function(seed: int) -> None:
    positions = [0, 1, 2, 63, 255, 100_000]
    got = gumbel_noise(torch.tensor([seed] * len(positions)), torch.tensor(positions), 300).numpy()
    expected = np.stack([noise(seed, position, 300) for position in positions])
    # the bits are equal; the two libraries' logarithms may differ in the last place
    np.testing.assert_allclose(got, expected, rtol=1e-14, atol=1e-14)
    assert len(np.unique(got)) == got.size


def test_noise_has_the_gumbel_distribution() -> None:
    """Kolmogorov-Smirnov on 200,000 draws, against the 0.1% critical value."""
    draws = np.sort(gumbel_noise(torch.arange(200), torch.arange(200) % 7, 1000).numpy().ravel())
    cdf = np.exp(-np.exp(-draws))
    n = len(draws)
    distance = max((np.arange(1, n + 1) / n - cdf).max(), (cdf - np.arange(n) / n).max())
    assert distance < 1.95 / np.sqrt(n)


# The 0.1% critical values of chi-square, by degrees of freedom.
CRITICAL = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}


@pytest.mark.parametrize("axis", ["seeds", "positions"])
@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.9), (1.3, 0.6), (1.0, 0.01)]
)
def test_distribution(axis: str, temperature: float, top_p: float) -> None:
    """Chi-square over many seeds at one position, and over many positions of one seed."""
    count, vocabulary = 20_000, 8
    generator = torch.Generator().manual_seed(5)
    head = Head(LinearWeight.from_dense(torch.randn(vocabulary, 16, generator=generator)), None, None)
    hidden = torch.randn(1, 16, generator=generator) * 0.4
    logits = (hidden @ head.weight.dense().T)[0].double().numpy()
    expected = softmax(logits / temperature)
    if top_p < 1:
        expected = np.where(keep_nucleus(expected, top_p), expected, 0)
        expected /= expected.sum()
    many, one = torch.arange(count), torch.full((count,), 9)
    seeds, positions = (many, one) if axis == "seeds" else (one, many)
    tokens = sample(hidden.expand(count, -1).contiguous(), head, seeds, positions, temperature, top_p)
    seen = np.bincount(tokens.numpy(), minlength=vocabulary)
    possible = expected > 0
    assert seen[~possible].sum() == 0
    if possible.sum() == 1:
        assert seen[possible] == count
        return
    chi_square = ((seen[possible] - count * expected[possible]) ** 2 / (count * expected[possible])).sum()
    assert chi_square < CRITICAL[possible.sum() - 1]


def test_neighbouring_positions_are_independent() -> None:
    """Chi-square of the joint distribution of two positions of the same seed."""
    count = 20_000
    head = Head(LinearWeight.from_dense(torch.tensor([[0.0], [0.4]])), None, None)
    hidden = torch.ones(count, 1)
    first, second = (sample(hidden, head, torch.arange(count), torch.full((count,), p), 1.0, 1.0) for p in (3, 4))
    p = softmax(np.array([0.0, 0.4]))
    expected = np.outer(p, p).ravel() * count
    seen = np.bincount((2 * first + second).numpy(), minlength=4)
    assert ((seen - expected) ** 2 / expected).sum() < CRITICAL[3]


def test_large_vocabularies_are_done_in_parts() -> None:
    """Rows are the same however many are asked for at once."""
    vocabulary, rows = 1 << 19, 9
    generator = torch.Generator().manual_seed(1)
    head = Head(LinearWeight.from_dense(torch.randn(vocabulary, 4, generator=generator)), None, 5.0)
    hidden = torch.randn(rows, 4, generator=generator)
    seeds, positions = torch.arange(rows) % 3, torch.arange(rows)
    whole = sample(hidden, head, seeds, positions, 1.0, 0.9)
    single = [sample(hidden[i : i + 1], head, seeds[i : i + 1], positions[i : i + 1], 1.0, 0.9) for i in range(rows)]
    assert torch.equal(whole, torch.cat(single))


def test_nan_rows_give_minus_one_and_the_others_are_unaffected() -> None:
    head = Head(LinearWeight.from_dense(torch.eye(6)), None, None)
    hidden = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    seeds = positions = torch.arange(4)
    good = sample(hidden, head, seeds, positions, 1.0, 0.9)
    hidden[2] = float("nan")
    bad = sample(hidden, head, seeds, positions, 1.0, 0.9)
    assert bad[2] == -1
    assert torch.equal(bad[[0, 1, 3]], good[[0, 1, 3]])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=12).filter(any), st.floats(0.01, 1.0))
def test_nucleus_is_the_smallest_set_that_reaches_the_mass(weights: list[int], top_p: float) -> None:
    """Ties go to lower indices. Powers of two make every sum exact."""
    total = 2 ** (sum(weights) - 1).bit_length()
    probabilities = np.array([*weights, total - sum(weights)]) / total
    got = nucleus(torch.tensor(probabilities)[None], top_p)[0].numpy()
    assert (got == keep_nucleus(probabilities, top_p)).all()
    assert probabilities[got].sum() >= top_p
    assert probabilities[got].sum() - probabilities[got].min() < top_p


def test_near_zero_temperature_is_greedy(oracle: Callable[[str], Oracle], load: Callable[..., Refiner]) -> None:
    for temperature, top_p in [(1e-5, 1.0), (1.0, 1e-9)]:
        options = RefineOptions(temperature=temperature, top_p=top_p, max_new_tokens=20)
        results = load("gemma2").refine([{"prompt_ids": p} for p in prompts(1)], options)
        assert [r.token_ids for r in results] == [oracle("gemma2").greedy(p, 20) for p in prompts(1)]


def test_oracle_noise_is_splitmix64() -> None:
    """The published first outputs of splitmix64 seeded with 1234567: its state grows by GOLDEN per draw."""
    state = np.uint64([1234567])
    outputs = []
    with np.errstate(over="ignore"):
        for _ in range(3):
            state = state + GOLDEN
            outputs.append(int(finalise(state)[0]))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_random_drafts_do_not_change_a_sample(load: Callable[..., Refiner]) -> None:
    rng = random.Random(0)
    drafts = [None, *([rng.randrange(VOCABULARY) for _ in range(20)] for _ in range(5))]
    requests = [{"prompt_ids": [7, 8, 9], "draft_ids": draft} for draft in drafts]
    results = load("qwen3").refine(requests, RefineOptions(temperature=2.0, max_new_tokens=20))
    assert len({tuple(result.token_ids) for result in results}) == 1
