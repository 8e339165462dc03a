"""One sequence's loop without tensors: a predictor of a few lines stands in for the model."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import RefineOptions
from engine.jacobi import JacobiSequence, Vocabulary

SIZE, EOS, PAD = 19, 1, 0
VOCABULARY = Vocabulary(SIZE, frozenset({EOS}), PAD)
Predictor = Callable[[list[int]], int]


def mixed(text: list[int]) -> int:
    """Often follows from the last token, sometimes from the last few."""
    value = (text[-1] * 5 + len(text)) if text[-1] % 3 else sum(text[-4:]) * 7 + len(text)
    return value % SIZE


class Cache:
    """What K/V a sequence has: the tokens it fed, by position, beside which nothing may be attended."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.tokens: dict[int, int] = {}

    def forward(self, tokens: list[int], position: int) -> list[int]:
        self.tokens.update({position + i: token for i, token in enumerate(tokens)})
        return [self.predictor([self.tokens[p] for p in range(position + i + 1)]) for i in range(len(tokens))]


def run(sequence: JacobiSequence, predictor: Predictor, budgets: list[int]) -> None:
    cache, passes = Cache(predictor), 0
    while not sequence.finish_reason:
        budget = budgets[passes % len(budgets)]
        feed = sequence.plan(budget, 1)
        assert 1 <= len(feed.tokens) <= budget
        assert feed.position + len(feed.tokens) <= sequence.longest
        predictions = cache.forward(feed.tokens, feed.position)
        sequence.advance(feed, predictions[feed.logit_start :])
        passes += 1
        assert passes < 3000


def sequential(predictor: Predictor, prompt: list[int], limit: int, kept: list[int]) -> list[int]:
    text: list[int] = []
    while len(text) < limit and EOS not in text:
        text.append(kept[len(text)] if len(text) < len(kept) else predictor(prompt + text))
    return text


def start(prompt: list[int], draft: list[int], **options: object) -> JacobiSequence:
    return JacobiSequence(prompt, draft, RefineOptions(**options), VOCABULARY, knee=11, seed=0)  # type: ignore[arg-type]


TOKENS = st.lists(st.integers(0, SIZE - 1), max_size=40)
BUDGETS = st.lists(st.integers(1, 50), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(
    TOKENS.filter(bool), TOKENS, BUDGETS, st.integers(1, 40), st.integers(0, 10), st.booleans(),
    st.one_of(st.just("auto"), st.integers(1, 45)),
)  # fmt: skip
def test_converges_to_sequential_decoding(
    prompt: list[int], draft: list[int], budgets: list[int], limit: int, keep: int, realign: bool, window: int
) -> None:
    """Row budgets change from pass to pass, as other sequences come and go."""
    sequence = start(prompt, draft, max_new_tokens=limit, keep_prefix=keep, realign=realign, window=window)
    run(sequence, mixed, budgets)
    kept = draft[:limit][:keep]
    assert sequence.final == sequential(mixed, prompt, limit, kept)
    assert sequence.converged
    assert sequence.finish_reason == ("eos" if sequence.final[-1] == EOS else "length")
    assert sequence.steps <= len(sequence.final) - min(len(kept), len(sequence.final))


@settings(max_examples=200, deadline=None)
@given(
    TOKENS.filter(bool), TOKENS, BUDGETS, st.integers(1, 40), st.integers(0, 10), st.integers(1, 6), st.integers(1, 50)
)
def test_steps_equal_the_plain_loop(
    prompt: list[int], draft: list[int], budgets: list[int], limit: int, keep: int, steps: int, block_size: int
) -> None:
    sequence = start(prompt, draft, max_new_tokens=limit, keep_prefix=keep, steps=steps, block_size=block_size)
    run(sequence, mixed, budgets)
    kept = draft[:limit][:keep]
    text = (draft + [PAD] * limit)[:limit]
    for first in range(0, limit, block_size):
        fixed = max(first, len(kept))
        for _ in range(steps):
            iterate = prompt + text
            for i in range(fixed, min(first + block_size, limit)):
                text[i] = mixed(iterate[: len(prompt) + i])
    assert sequence.final == (text[: text.index(EOS) + 1] if EOS in text else text)


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_a_mismatch_is_where_the_next_window_starts(window: int) -> None:
    """Predictions up to and including the first mismatch are final; K/V is valid only below it."""
    answer = [4, 6, 8, 10, 12, 14]

    def predictor(text: list[int]) -> int:
        return answer[len(text) - 2] if len(text) - 2 < len(answer) else 3

    sequence = start([9, 9], [4, 6, 7, 10, 12, 14], max_new_tokens=6, window=window, realign=False)
    run(sequence, predictor, [99])
    assert sequence.final == answer
    assert sequence.steps == {1: 6, 2: 4, 5: 2, 40: 2}[window]


def test_a_passing_eos_in_the_iterate_does_not_end_the_answer() -> None:
    def predictor(text: list[int]) -> int:
        return EOS if text[-1] == 18 else (4 if len(text) < 9 else EOS)

    sequence = start([5], [18, 18, 18, 18, 18, 18], max_new_tokens=20, window=20, realign=False)
    run(sequence, predictor, [99])
    assert sequence.final == sequential(predictor, [5], 20, [])
    assert len(sequence.final) == 9


@pytest.mark.parametrize("keep", [1, 3, 9])
def test_eos_in_the_kept_prefix_ends_the_answer_at_once(keep: int) -> None:
    sequence = start([5], [EOS, 4, 4], keep_prefix=keep)
    assert (sequence.final, sequence.finish_reason, sequence.steps, sequence.converged) == ([EOS], "eos", 0, True)


def test_a_kept_prefix_as_long_as_the_answer_is_the_answer() -> None:
    sequence = start([5], [4] * 30, keep_prefix=30, max_new_tokens=10)
    assert (sequence.final, sequence.finish_reason) == ([4] * 10, "length")


def test_nan_matters_only_where_it_would_be_final() -> None:
    answer = [4, 6, 8, 10, 12]

    def predictor(text: list[int]) -> int:
        right = text[1:] == answer[: len(text) - 1]
        return (answer[len(text) - 1] if len(text) <= len(answer) else 3) if right else -1

    sequence = start([9], [4, 7, 7, 7, 7], max_new_tokens=5, window=9, realign=False)
    run(sequence, predictor, [99])
    assert sequence.final == answer
    broken = start([9], [4, 6, 0, 0], max_new_tokens=5, window=9, realign=False)
    run(broken, lambda text: predictor(text) if len(text) < 3 else -1, [99])
    assert broken.finish_reason == "error"
    assert len(broken.final) == 2


def test_auto_window_without_acceptance_comes_down_to_plain_decoding() -> None:
    """A draft of which nothing is right costs some rows until that is known, and none after it."""

    def wasted(limit: int) -> int:
        sequence = start([5], [0] * limit, max_new_tokens=limit, realign=False)
        run(sequence, lambda text: 2 + (sum(text) * 31 + len(text) * 17) % (SIZE - 2), [999])
        return sequence.forward_tokens - limit

    assert 0 < wasted(100) == wasted(300)
