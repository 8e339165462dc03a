"""Converged refinement equals transformers' greedy generate, token for token, whatever the draft and the settings."""

import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import RefineOptions, Refiner
from engine.request import Result
from tests.engine.checkpoints import FAMILIES, LONGEST, PAD, VOCABULARY, Oracle, edit_config, generate, prompts

DRAFTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "mt_bench_drafts.jsonl"
KINDS = ("none", "empty", "random", "shuffled", "right", "edited", "shifted", "pad", "beyond the end", "real")
PROMPTS = prompts(1)


def real_texts() -> list[list[int]]:
    """Real answers, each word hashed into the vocabulary; none where the data is not there."""
    if not DRAFTS.exists():
        return []
    with DRAFTS.open() as file:
        rows = [json.loads(line) for _, line in zip(range(12), file, strict=False)]
    return [[4 + zlib.crc32(w.encode()) % (VOCABULARY - 4) for w in row["drafts"][0].split()] for row in rows]


REAL = real_texts()


def edit(answer: list[int], rng: random.Random) -> list[int]:
    """The answer with a few insertions, deletions and substitutions."""
    text = list(answer)
    for _ in range(rng.randint(1, 4)):
        place = rng.randint(0, len(text))
        change = rng.choice(("insert", "delete", "replace"))
        fresh = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 3))] if change != "delete" else []
        text[place : place + (0 if change == "insert" else max(1, len(fresh)))] = fresh
    return text


def make_draft(kind: str, answer: list[int], rng: random.Random) -> list[int] | None:
    if kind == "none":
        return None
    if kind == "random":
        return [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 70))]
    if kind == "shuffled":
        return rng.sample(answer, len(answer))
    if kind == "edited":
        return edit(answer, rng)
    if kind == "shifted":
        return [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9))] + answer
    if kind == "beyond the end":
        return answer + answer
    if kind == "real" and REAL:
        return rng.choice(REAL)
    return {"empty": [], "right": answer, "pad": [PAD] * 20}.get(kind, list(answer[::-1]))


def expected(oracle: Oracle, prompt: list[int], draft: list[int] | None, options: RefineOptions) -> list[int]:
    """Kept draft tokens, then what transformers generates behind them."""
    kept = (draft or [])[: min(options.keep_prefix, options.max_new_tokens)]
    for place, token in enumerate(kept):
        if token in oracle.eos:
            return kept[: place + 1]
    left = options.max_new_tokens - len(kept)
    return kept + (oracle.greedy(prompt + kept, left) if left else [])


def check_account(result: Result, prompt: list[int], kept: int, options: RefineOptions, eos: frozenset[int]) -> None:
    """The counters and flags mean what they say."""
    n = len(result.token_ids)
    assert result.error is None
    assert result.converged
    assert result.finish_reason == ("eos" if result.token_ids[-1] in eos else "length")
    assert result.finish_reason == "eos" or n == options.max_new_tokens
    assert not eos & set(result.token_ids[:-1])
    fresh = n - min(kept, n)
    assert result.steps <= fresh
    assert (result.steps == 0) == (fresh == 0)
    if fresh:
        assert result.forward_tokens >= len(prompt) + n - 1  # each token's predecessors had to be computed
        if options.window != "auto":
            assert result.forward_tokens <= len(prompt) + kept - 1 + result.steps * options.window
    else:
        assert result.forward_tokens == 0


OPTIONS = st.builds(
    RefineOptions,
    window=st.one_of(st.just("auto"), st.integers(1, 12), st.integers(1, 80)),
    realign=st.booleans(),
    keep_prefix=st.sampled_from([0, 0, 0, 1, 3, 12, 60]),
    max_new_tokens=st.one_of(st.just(LONGEST), st.integers(1, LONGEST)),
)
REQUESTS = st.lists(
    st.tuples(st.integers(0, len(PROMPTS) - 1), st.sampled_from(KINDS), st.integers(0, 7)), min_size=1, max_size=6
)
LIMITS = st.tuples(st.sampled_from([1, 2, 3, 5, 8, 17, 40, 2048]), st.sampled_from([1, 2, 3, 64]))


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_greedy_generate(name: str, oracle: Callable[[str], Oracle], load: Callable[..., Refiner]) -> None:
    model = oracle(name)

    @settings(max_examples=30, deadline=None)
    @given(OPTIONS, REQUESTS, LIMITS)
    def check(options: RefineOptions, cases: list[tuple[int, str, int]], limits: tuple[int, int]) -> None:
        work = []
        for index, kind, seed in cases:
            prompt = PROMPTS[index]
            work.append((prompt, make_draft(kind, model.greedy(prompt), random.Random(seed))))
        requests = [{"prompt_ids": prompt, "draft_ids": draft} for prompt, draft in work]
        results = load(name, *limits).refine(requests, options)
        for (prompt, draft), result in zip(work, results, strict=True):
            assert result.token_ids == expected(model, prompt, draft, options)
            check_account(result, prompt, min(options.keep_prefix, len(draft or [])), options, model.eos)

    check()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_oracle_is_worth_something(name: str, oracle: Callable[[str], Oracle]) -> None:
    """Answers vary within and between prompts, and some are ended by EOS."""
    answers = [oracle(name).greedy(prompt) for prompt in PROMPTS + prompts(0)]
    assert len({tuple(answer) for answer in answers}) > len(PROMPTS)
    assert sum(len(set(answer)) for answer in answers) > 60
    assert any(oracle(name).ends_with_eos(answer) and len(answer) > 5 for answer in answers)


@pytest.mark.parametrize("name", FAMILIES)
def test_right_draft_takes_one_step(name: str, oracle: Callable[[str], Oracle], load: Callable[..., Refiner]) -> None:
    answers = [oracle(name).greedy(prompt) for prompt in PROMPTS]
    requests = [{"prompt_ids": p, "draft_ids": a} for p, a in zip(PROMPTS, answers, strict=True)]
    results = load(name).refine(requests, RefineOptions(window=80, max_new_tokens=LONGEST))
    assert [result.token_ids for result in results] == answers
    assert [result.steps for result in results] == [1] * len(answers)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_no_draft_and_no_guesses_is_plain_decoding(
    name: str, oracle: Callable[[str], Oracle], load: Callable[..., Refiner]
) -> None:
    results = load(name).refine([{"prompt_ids": p} for p in PROMPTS], RefineOptions(window=1, max_new_tokens=LONGEST))
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.steps == len(result.token_ids)
        assert result.forward_tokens == len(prompt) + len(result.token_ids) - 1


def test_realignment_saves_steps(oracle: Callable[[str], Oracle], load: Callable[..., Refiner]) -> None:
    """Behind one insertion the rest of the draft is right, at shifted positions."""
    with_it, without = 0, 0
    for name in FAMILIES:
        for prompt in PROMPTS:
            answer = oracle(name).greedy(prompt)
            request = {"prompt_ids": prompt, "draft_ids": [*answer[:4], 97, 98, *answer[4:]]}
            for realign in (True, False):
                options = RefineOptions(window=60, max_new_tokens=LONGEST, realign=realign)
                (result,) = load(name).refine([request], options)
                with_it, without = with_it + result.steps * realign, without + result.steps * (not realign)
    assert with_it < without / 3


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2-untied"])
@pytest.mark.parametrize("threads", [2, 3])
def test_more_threads(name: str, threads: int, oracle: Callable[[str], Oracle], load: Callable[..., Refiner]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = load(name).refine(
            [{"prompt_ids": p, "draft_ids": p} for p in PROMPTS], RefineOptions(max_new_tokens=12)
        )
    finally:
        torch.set_num_threads(before)
    assert [result.token_ids for result in results] == [oracle(name).greedy(p, 12) for p in PROMPTS]


@pytest.mark.parametrize("eos", [None, 9, [9, 60]])
def test_eos_of_config_json_where_there_is_no_generation_config(
    eos: int | list[int] | None, checkpoint: Callable[[str], Path], oracle: Callable[[str], Oracle]
) -> None:
    folder = edit_config(checkpoint("llama"), eos_token_id=eos)
    (folder / "generation_config.json").unlink()
    model = type(oracle("llama").model).from_pretrained(folder, attn_implementation="eager")
    with Refiner.from_pretrained(folder, kv_cache_tokens=2048) as refiner:
        results = refiner.refine([{"prompt_ids": p} for p in PROMPTS], RefineOptions(max_new_tokens=40))
    assert [result.token_ids for result in results] == [generate(model, p, 40) for p in PROMPTS]


@pytest.mark.parametrize("fields", [{"eos_token_id": 60}, {"eos_token_id": [60, 7], "pad_token_id": 5}])
def test_eos_of_generation_config_json(
    fields: dict[str, object], checkpoint: Callable[[str], Path], oracle: Callable[[str], Oracle]
) -> None:
    """It goes before the one of config.json."""
    folder = edit_config(checkpoint("llama"), eos_token_id=53)
    (folder / "generation_config.json").write_text(json.dumps(fields))
    model = type(oracle("llama").model).from_pretrained(folder, attn_implementation="eager")
    with Refiner.from_pretrained(folder, kv_cache_tokens=2048) as refiner:
        results = refiner.refine([{"prompt_ids": p} for p in PROMPTS], RefineOptions(max_new_tokens=40))
    assert [result.token_ids for result in results] == [generate(model, p, 40) for p in PROMPTS]


def test_eos_that_generation_config_json_leaves_out_is_that_of_config_json(checkpoint: Callable[[str], Path]) -> None:
    folder = edit_config(checkpoint("llama"), eos_token_id=53)
    (folder / "generation_config.json").write_text("{}")
    with Refiner.from_pretrained(folder, kv_cache_tokens=2048) as refiner:
        results = refiner.refine([{"prompt_ids": p} for p in PROMPTS], RefineOptions(max_new_tokens=40))
    assert any(result.finish_reason == "eos" for result in results)
    assert {result.token_ids[-1] for result in results if result.finish_reason == "eos"} == {53}
