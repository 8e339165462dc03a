"""The engine on a GPU against transformers' greedy generate; on a machine without one the same cases run on its CPU.

Not collected by default: bench/gpu.sh runs this file.
"""

import random
from collections.abc import Callable

import pytest
import torch

from engine import RefineOptions, Refiner
from tests.engine.checkpoints import FAMILIES, LONGEST, VOCABULARY, Oracle, prompts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = prompts(1)


def drafts(oracle: Oracle, seed: int) -> list[list[int]]:
    """Right ones, right ones with a hole, random ones."""
    rng = random.Random(seed)
    found = []
    for i, prompt in enumerate(PROMPTS):
        answer = oracle.greedy(prompt)
        noise = [rng.randrange(VOCABULARY) for _ in range(30)]
        found.append((answer, answer[: len(answer) // 2] + answer[len(answer) // 2 + 1 :], noise)[i % 3])
    return found


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"window": 64, "realign": False}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_float32_equals_greedy_generate(name: str, options: dict[str, object], oracle: Callable[[str], Oracle]) -> None:
    o = oracle(name)
    requests = [{"prompt_ids": p, "draft_ids": d} for p, d in zip(PROMPTS, drafts(o, 3), strict=True)]
    with Refiner.from_pretrained(o.folder, device=DEVICE, backend="lean", kv_cache_tokens=2048) as refiner:
        results = refiner.refine(requests, RefineOptions(max_new_tokens=LONGEST, **options))  # type: ignore[arg-type]
        refiner.check_integrity()
    assert [r.token_ids for r in results] == [o.greedy(p) for p in PROMPTS]
    assert all(r.converged for r in results)


@pytest.mark.parametrize("steps", [1, 3])
def test_limited_steps_are_those_of_the_cpu(steps: int, oracle: Callable[[str], Oracle]) -> None:
    o = oracle("llama")
    requests = [{"prompt_ids": p, "draft_ids": d} for p, d in zip(PROMPTS, drafts(o, 4), strict=True)]
    found = []
    for device in ("cpu", DEVICE):
        with Refiner.from_pretrained(o.folder, device=device, kv_cache_tokens=2048) as refiner:
            found.append(refiner.refine(requests, RefineOptions(max_new_tokens=LONGEST, steps=steps)))
    for a, b in zip(*found, strict=True):
        assert (a.token_ids, a.steps, a.converged) == (b.token_ids, b.steps, b.converged)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_low_precision_keeps_its_own_answer(name: str, dtype: str, oracle: Callable[[str], Oracle]) -> None:
    """What it converges to from nothing it finds right as a draft, but for near-ties between kernels' rounding."""
    o = oracle(name)
    with Refiner.from_pretrained(o.folder, device=DEVICE, dtype=dtype, kv_cache_tokens=2048) as refiner:
        options = RefineOptions(max_new_tokens=24)
        alone = [r.token_ids for r in refiner.refine([{"prompt_ids": p} for p in PROMPTS], options)]
        drafted = refiner.refine(
            [{"prompt_ids": p, "draft_ids": d} for p, d in zip(PROMPTS, alone, strict=True)], options
        )
        refiner.check_integrity()
    kept = sum(r.token_ids == answer for r, answer in zip(drafted, alone, strict=True))
    assert kept >= len(PROMPTS) - 1
    assert all(r.error is None for r in drafted)
