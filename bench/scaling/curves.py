"""What is varied, and what is timed at every size. Widths are those of a Llama of 135M parameters or of the shipped refiner."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from bench.baselines import full_reforward_jacobi, greedy_generate
from bench.bench_refine import Subject, read_drafts
from bench.consistency_variants import Loss, Shape, eager, inputs, ours, step
from bench.suite import kernels
from engine import RefineOptions
from engine.batch import Feed, StepBatch
from engine.kernels import linear_argmax
from engine.kv_cache import pages_for
from engine.model import Decoder
from engine.refiner import DEFAULT_CHECKPOINT

Calls = dict[str, Callable[[], Any]]
DRAFTS = Path(__file__).parents[1] / "demo" / "drafts.jsonl"
LOSSES: dict[str, Loss] = {"engine": ours, "eager": eager}
STEP_ROWS = 16


@dataclass(frozen=True)
class Curve:
    """Cost of ``variants`` against one size."""

    name: str
    x: str
    sizes: tuple[int, ...]
    expected: dict[str, str]
    """Exponent by variant."""
    build: Callable[[int], Calls]
    rounds: int = 9


def loss(rows: int, vocabulary: int, d: int = 256) -> Calls:
    leaves, labels = inputs(Shape(rows, d, vocabulary, torch.float32))
    return {name: functools.partial(step, of, leaves, labels, None) for name, of in LOSSES.items()}


def operation(build: Any, *shape: int) -> Calls:
    return dict(build(shape, torch.float32).calls)


@functools.cache
def decoder() -> Decoder:
    config = AutoConfig.from_pretrained(DEFAULT_CHECKPOINT)
    return Decoder.load(DEFAULT_CHECKPOINT, config, torch.float32, torch.device("cpu"))


def jacobi_step(sequences: int, rows: int, prompt: int) -> Calls:
    """One forward pass of the shipped refiner with the argmax of every row, each sequence behind a prompt in the cache."""
    model = decoder()
    each = pages_for(prompt + rows)
    cache = model.new_cache(each * sequences)
    ids = torch.randint(3, 4096, (sequences, prompt + rows), generator=torch.Generator().manual_seed(0)).tolist()
    pages = [list(range(s * each, (s + 1) * each)) for s in range(sequences)]

    def feeds(start: int, stop: int) -> StepBatch:
        packed = [Feed(text[start:stop], start, mine, 0) for text, mine in zip(ids, pages, strict=True)]
        return StepBatch.pack(packed, model.device)

    if prompt:
        model.forward(feeds(0, prompt), cache)
    return {"engine": lambda: linear_argmax(model.forward(feeds(prompt, prompt + rows), cache), model.head.weight)}


@functools.cache
def subject() -> tuple[Subject, dict[str, Any]]:
    """The shipped refiner and a request of the demo whose answer without its draft is long."""
    found = Subject(DEFAULT_CHECKPOINT)
    return found, found.ids(read_drafts(DRAFTS, 1), None)[0]


def answer(tokens: int) -> Calls:
    """All find the same ``tokens`` tokens, from no draft; the script from padding, as it does without one."""
    who, row = subject()
    prompt, vocabulary = row["prompt_ids"], who.vocabulary

    def refine(**options: Any) -> list[int]:
        asked = RefineOptions(max_new_tokens=tokens, **options)
        return who.refiner.refine([{"prompt_ids": prompt}], asked)[0].token_ids

    calls: Calls = {
        "engine": refine,
        "token by token": lambda: refine(window=1, realign=False),
        "public script": lambda: full_reforward_jacobi(who.theirs, prompt, [], tokens, vocabulary.pad, vocabulary.eos)[
            0
        ],
        "generate": lambda: greedy_generate(who.theirs, [prompt], tokens, vocabulary.pad)[0],
    }
    answers = {name: call() for name, call in calls.items()}
    assert len(answers["engine"]) == tokens, f"the answer ends after {len(answers['engine'])} of {tokens} tokens"
    assert all(found == answers["engine"] for found in answers.values()), answers
    return calls


BOTH = {"engine": "1", "eager": "1"}
CURVES = (
    Curve("consistency_loss", "vocabulary", (4096, 8192, 16384, 32768, 65536), BOTH, lambda v: loss(64, v)),
    Curve("consistency_loss", "rows of each stream", (32, 64, 128, 256, 512), BOTH, lambda n: loss(n, 8192)),
    Curve(
        "linear_argmax", "vocabulary", (4096, 8192, 16384, 32768, 65536), BOTH,
        lambda v: operation(kernels.of_linear_argmax, 16, 576, v),
    ),
    Curve(
        "linear_argmax", "rows", (32, 64, 128, 256, 512), BOTH, lambda n: operation(kernels.of_linear_argmax, n, 576, 16384)
    ),
    Curve("linear", "rows", (32, 64, 128, 256, 512, 1024), BOTH, lambda n: operation(kernels.of_linear, n, 576, 3072)),
    Curve(
        "paged_attention", "positions in front", (256, 512, 1024, 2048, 4096), {"engine": "1", "sdpa": "1"},
        lambda n: operation(kernels.of_attention, STEP_ROWS, n),
    ),
    Curve(
        "Jacobi step", "prompt length", (120, 240, 480, 960, 1920), {"engine": "0 (projections) to 1 (attention)"},
        lambda n: jacobi_step(1, STEP_ROWS, n),
    ),
    Curve("first step", "prompt length", (128, 256, 512, 1024, 2048), {"engine": "1 (projections) to 2 (attention)"},
          lambda n: jacobi_step(1, n, 0), rounds=7),
    Curve("Jacobi step", "batch", (1, 2, 4, 8, 16, 32), {"engine": "1"}, lambda n: jacobi_step(n, STEP_ROWS, 128)),
    Curve(
        "whole answer", "answer length", (32, 64, 128, 256),
        {"engine": "1", "token by token": "1", "public script": "1 to 2 (steps times length)", "generate": "1"}, answer,
        rounds=3,
    ),
)  # fmt: skip
