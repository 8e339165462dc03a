"""steps=k equals k plain Jacobi iterations: full forward passes of the transformers model over prompt and block."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import RefineOptions, Refiner
from tests.engine.checkpoints import FAMILIES, PAD, VOCABULARY, Oracle, prompts

PROMPTS = prompts(1)[:5]


@dataclass
class Loop:
    """The plain loop; its iterates are computed once."""

    oracle: Oracle
    _next: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def iterate(self, context: list[int], guess: list[int]) -> list[int]:
        """Every position of ``guess`` replaced by the argmax behind the old guesses before it."""
        key = (len(context), *context, *guess)
        if key not in self._next:
            rows = self.oracle.logits(context + guess)[len(context) - 1 : -1]
            self._next[key] = rows.argmax(-1).tolist()
        return self._next[key]

    def answer(self, prompt: list[int], draft: list[int], options: RefineOptions) -> tuple[list[int], bool]:
        """The final iterate cut at its first EOS, and whether every block that counts had come to its fixed point."""
        limit, kept = options.max_new_tokens, draft[: options.max_new_tokens][: options.keep_prefix]
        text = (draft + [PAD] * limit)[:limit]
        for place, token in enumerate(kept):
            if token in self.oracle.eos:
                return kept[: place + 1], True
        converged = True
        for start in range(0, limit, options.block_size):
            stop = min(limit, start + options.block_size)
            first = max(start, len(kept))
            if first < stop:
                block = text[first:stop]
                for _ in range(options.steps or 0):
                    block = self.iterate(prompt + text[:first], block)
                text[first:stop] = block
                end = next((i + 1 for i, token in enumerate(block) if token in self.oracle.eos), len(block))
                converged &= block[:end] == self.iterate(prompt + text[:first], block)[:end]
            for place in range(start, stop):
                if text[place] in self.oracle.eos:
                    return text[: place + 1], converged
        return text, converged


@pytest.fixture(scope="module")
def loop(oracle: Callable[[str], Oracle]) -> Callable[[str], Loop]:
    made: dict[str, Loop] = {}
    return lambda name: made.setdefault(name, Loop(oracle(name)))


OPTIONS = st.builds(
    RefineOptions,
    steps=st.sampled_from([1, 1, 2, 3, 5]),
    keep_prefix=st.sampled_from([0, 0, 1, 4, 15]),
    max_new_tokens=st.integers(1, 24),
    block_size=st.sampled_from([2, 5, 8, 13, 256, 256]),
    window=st.sampled_from(["auto", 1, 4]),
    realign=st.booleans(),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_plain_loop(name: str, loop: Callable[[str], Loop], load: Callable[..., Refiner]) -> None:
    plain = loop(name)

    @settings(max_examples=10, deadline=None)
    @given(
        OPTIONS,
        st.lists(st.tuples(st.integers(0, 4), st.integers(0, 45), st.booleans(), st.randoms()), min_size=1, max_size=4),
        st.sampled_from([1, 2, 7, 20, 2048]),
    )
    def check(options: RefineOptions, cases: list[tuple], max_batch_tokens: int) -> None:
        work = []
        for index, length, right, rng in cases:
            noise = [rng.randrange(VOCABULARY) for _ in range(length)]
            answer = plain.oracle.greedy(PROMPTS[index], 32) + noise
            changed = [rng.choice(pair) if rng.random() < 0.3 else pair[0] for pair in zip(answer, noise, strict=False)]
            work.append((PROMPTS[index], changed if right else noise))
        requests = [{"prompt_ids": prompt, "draft_ids": draft} for prompt, draft in work]
        for (prompt, draft), result in zip(work, load(name, max_batch_tokens).refine(requests, options), strict=True):
            text, converged = plain.answer(prompt, draft, options)
            assert result.error is None
            assert result.token_ids == text
            # the engine stops where it knows the fixed point; an iterate that is right by chance it does not know yet
            if result.converged:
                assert converged
            assert (result.finish_reason == "steps") <= (not result.converged)
            blocks = -(-options.max_new_tokens // options.block_size)
            assert result.steps <= (options.steps or 0) * blocks

    check()


def test_enough_steps_converge(oracle: Callable[[str], Oracle], load: Callable[..., Refiner]) -> None:
    """Position i is right after at most i + 1 steps, whatever the draft."""
    for name in FAMILIES:
        requests = [{"prompt_ids": prompt, "draft_ids": [5] * 9} for prompt in PROMPTS]
        for result, prompt in zip(
            load(name).refine(requests, RefineOptions(steps=24, max_new_tokens=24)), PROMPTS, strict=True
        ):
            answer = oracle(name).greedy(prompt, 24)
            assert result.token_ids == answer
            assert result.converged
            assert result.finish_reason == ("eos" if oracle(name).ends_with_eos(answer) else "length")


def test_unconverged_answers_say_so(oracle: Callable[[str], Oracle], load: Callable[..., Refiner]) -> None:
    seen = 0
    for name in FAMILIES:
        requests = [{"prompt_ids": prompt, "draft_ids": [7, 8] * 16} for prompt in PROMPTS]
        results = load(name).refine(requests, RefineOptions(steps=1, max_new_tokens=32))
        for result, prompt in zip(results, PROMPTS, strict=True):
            if result.token_ids != oracle(name).greedy(prompt, 32):
                seen += 1
                assert not result.converged
                assert result.finish_reason == "steps"
            assert result.steps == 1
    assert seen > len(FAMILIES) * len(PROMPTS) / 2


def test_the_right_draft_is_converged_after_one_step(
    oracle: Callable[[str], Oracle], load: Callable[..., Refiner]
) -> None:
    for name in FAMILIES:
        answers = [oracle(name).greedy(prompt, 30) for prompt in PROMPTS]
        requests = [{"prompt_ids": p, "draft_ids": a} for p, a in zip(PROMPTS, answers, strict=True)]
        results = load(name).refine(requests, RefineOptions(steps=1, max_new_tokens=30))
        assert [(r.token_ids, r.converged, r.steps) for r in results] == [(a, True, 1) for a in answers]
