"""The engine on a GPU against transformers' greedy generate; on a machine without one the same cases run on its CPU.

Not collected by default: bench/gpu.sh runs this file.
"""

import gc
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from engine import RefineOptions, Refiner
from engine.step_runner import GraphRunner
from tests.engine.checkpoints import FAMILIES, LONGEST, VOCABULARY, Oracle, prompts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = prompts(1)
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@contextmanager
def opened(o: Oracle, **options: Any) -> Iterator[Refiner]:
    """A refiner on DEVICE; there its steps must have been replayed from graphs, of which none failed to be captured."""
    limits = {"device": DEVICE, "kv_cache_tokens": 2048} | options
    with Refiner.from_pretrained(o.folder, **limits) as refiner:
        yield refiner
        refiner.check_integrity()
        if torch.device(limits["device"]).type == "cuda":
            counts = graphs(refiner).counts
            assert counts.failed == 0
            assert counts.captured > 0
            assert counts.replayed > 0


def graphs(refiner: Refiner) -> GraphRunner:
    scheduler = refiner._scheduler
    assert scheduler is not None
    assert scheduler.loop is not None
    runner = scheduler.loop._runner
    assert isinstance(runner, GraphRunner)
    return runner


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
    with opened(o, backend="lean") as refiner:
        results = refiner.refine(requests, RefineOptions(max_new_tokens=LONGEST, **options))  # type: ignore[arg-type]
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
    with opened(o, dtype=dtype) as refiner:
        options = RefineOptions(max_new_tokens=24)
        alone = [r.token_ids for r in refiner.refine([{"prompt_ids": p} for p in PROMPTS], options)]
        drafted = refiner.refine(
            [{"prompt_ids": p, "draft_ids": d} for p, d in zip(PROMPTS, alone, strict=True)], options
        )
    kept = sum(r.token_ids == answer for r, answer in zip(drafted, alone, strict=True))
    assert kept >= len(PROMPTS) - 1
    assert all(r.error is None for r in drafted)


def test_samples_are_those_of_the_cpu(oracle: Callable[[str], Oracle]) -> None:
    o = oracle("llama")
    requests = [{"prompt_ids": p, "seed": 7 * i} for i, p in enumerate(PROMPTS)]
    options = RefineOptions(max_new_tokens=LONGEST, temperature=0.8)
    found = []
    for device in ("cpu", DEVICE):
        with opened(o, device=device) as refiner:
            found.append([r.token_ids for r in refiner.refine(requests, options)])
            assert device == "cpu" or any(kind.sampled for kind in graphs(refiner)._graphs)
    assert found[0] == found[1]


@pytest.mark.parametrize("shared", [True, False], ids=["one refiner", "two refiners"])
def test_two_threads_on_streams_of_their_own(shared: bool, oracle: Callable[[str], Oracle]) -> None:
    """They share a batch, or capture at the same time."""
    o = oracle("llama")
    requests = [{"prompt_ids": p, "draft_ids": d} for p, d in zip(PROMPTS, drafts(o, 5), strict=True)]
    right = [o.greedy(p) for p in PROMPTS]
    found: list[list[list[int]]] = []

    def work(refiner: Refiner) -> None:
        with torch.cuda.stream(torch.cuda.Stream()) if DEVICE == "cuda" else nullcontext():
            for window in ("auto", 3, 9):
                options = RefineOptions(max_new_tokens=LONGEST, window=window)  # type: ignore[arg-type]
                found.append([r.token_ids for r in refiner.refine(requests, options)])

    with opened(o) as one, nullcontext(one) if shared else opened(o) as other:
        threads = [threading.Thread(target=work, args=(refiner,)) for refiner in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [right] * 6


@on_gpu
def test_close_gives_memory_back(oracle: Callable[[str], Oracle]) -> None:
    """Without the help of Python's collector; cuBLAS keeps workspaces per stream, which are let go first."""

    def allocated() -> int:
        torch._C._cuda_clearCublasWorkspaces()
        return torch.cuda.memory_allocated()

    o = oracle("llama")
    requests = [{"prompt_ids": p} for p in PROMPTS]
    gc.collect()
    gc.disable()
    try:
        before = allocated()
        with opened(o, kv_cache_tokens=1 << 16) as refiner:
            refiner.refine(requests, RefineOptions(max_new_tokens=LONGEST))
            assert torch.cuda.memory_allocated() - before > 32 << 20
        assert allocated() - before < 1 << 20
    finally:
        gc.enable()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(oracle: Callable[[str], Oracle]) -> None:
    o = oracle("llama")
    with opened(o, device="cuda:1") as refiner:
        results = refiner.refine([{"prompt_ids": p} for p in PROMPTS], RefineOptions(max_new_tokens=LONGEST))
    assert [r.token_ids for r in results] == [o.greedy(p) for p in PROMPTS]
    assert torch.cuda.current_device() == 0
