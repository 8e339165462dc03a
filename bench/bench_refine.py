"""Whole refinements: the engine against the public script's algorithm and against transformers' greedy generate.

Same weights, float32, threads, prompts, EOS rule and length limit, in one process, the variants in turn. Every variant's
answer is compared with transformers' greedy answer before its time counts.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.baselines import full_reforward_jacobi, greedy_generate
from bench.measure import interleaved, medians, ratios, spread
from engine import RefineOptions, Refiner, Result
from engine.options import DEFAULT_CONDITION
from engine.refiner import read_vocabulary
from engine.request import Request

MAX_NEW_TOKENS = 256
Rows = list[dict[str, Any]]


class Subject:
    """One checkpoint, loaded in transformers and in the engine."""

    def __init__(self, folder: Path) -> None:
        self.theirs: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.refiner = Refiner.from_pretrained(folder)
        self.vocabulary = read_vocabulary(folder, self.theirs.config, None)

    @property
    def has_tokenizer(self) -> bool:
        return self.refiner._codec.tokenizer is not None

    def ids(self, rows: Rows, condition: str | None) -> Rows:
        """The rows as prompt_ids and draft_ids in the refiner's tokens, so that every variant gets the same input."""
        codec = self.refiner._codec
        pairs = [codec.encode(Request(prompt=r["prompt"], draft=r["draft"]), condition) for r in rows]
        return [{"prompt_ids": prompt, "draft_ids": draft} for prompt, draft in pairs]

    def refine(self, rows: Rows, **options: Any) -> list[Result]:
        return self.refiner.refine(rows, RefineOptions(max_new_tokens=MAX_NEW_TOKENS, **options))

    def generate(self, rows: Rows, **options: Any) -> list[list[int]]:
        return greedy_generate(
            self.theirs, [r["prompt_ids"] for r in rows], MAX_NEW_TOKENS, self.vocabulary.pad, **options
        )

    def script(self, row: dict[str, Any]) -> tuple[list[int], int]:
        return full_reforward_jacobi(
            self.theirs, row["prompt_ids"], row["draft_ids"], MAX_NEW_TOKENS, self.vocabulary.pad, self.vocabulary.eos
        )


def against_generate(subject: Subject, rows: Rows, rounds: int) -> dict[str, Any]:
    """One batch of all rows: given drafts, no draft, the right draft, against generate with either cache; and what a draft
    of random tokens without re-alignment, of which nothing is accepted, costs against decoding token by token."""
    answers = subject.generate(rows)
    right = [{**row, "draft_ids": answer} for row, answer in zip(rows, answers, strict=True)]
    none = [{"prompt_ids": row["prompt_ids"]} for row in rows]
    random = random_drafts(rows, subject.vocabulary.size)
    variants: dict[str, Callable[[], Any]] = {
        "generate_dynamic": lambda: subject.generate(rows),
        "generate_static": lambda: subject.generate(rows, cache_implementation="static"),
        "refine_given_draft": lambda: subject.refine(rows),
        "refine_no_draft": lambda: subject.refine(none),
        "refine_right_draft": lambda: subject.refine(right),
        "token_by_token": lambda: subject.refine(none, window=1, realign=False),
        "refine_random_draft": lambda: subject.refine(random, realign=False),
    }
    details = {}
    for name in list(variants)[2:]:
        results = variants[name]()
        identical = sum(r.token_ids == answer for r, answer in zip(results, answers, strict=True))
        details[name] = work(results) | {"identical": identical}
    seconds = interleaved(variants, rounds, warmup=0)
    faster = min(("generate_dynamic", "generate_static"), key=lambda name: statistics.median(seconds[name]))
    return {
        "batch": len(rows),
        "answer_tokens": sum(map(len, answers)),
        "seconds": medians(seconds),
        "spread": spread(seconds),
        "work": details,
        "faster_generate": faster,
        "ratios": {name: ratios(seconds, faster, name) for name in details},
        "token_by_token_over_random_draft": ratios(seconds, "token_by_token", "refine_random_draft"),
    }


def against_script(subject: Subject, rows: Rows, rounds: int) -> dict[str, Any]:
    """Row by row against the public script's algorithm, whose answers must be the same."""
    with torch.inference_mode():  # a whole run of the script would take as long as a round
        subject.theirs(torch.tensor([rows[0]["prompt_ids"]]))
    subject.refine(rows[:1])
    theirs: list[tuple[list[int], int]] = []
    ours: list[Result] = []

    def script() -> None:
        theirs[:] = [subject.script(row) for row in rows]

    def refine() -> None:
        ours[:] = [subject.refine([row])[0] for row in rows]

    seconds = interleaved({"script": script, "refine": refine}, rounds, warmup=0)
    assert [answer for answer, _ in theirs] == [result.token_ids for result in ours]
    return {
        "rows": len(rows),
        "seconds": medians(seconds),
        "spread": spread(seconds),
        "script_steps": [steps for _, steps in theirs],
        "work": work(ours),
        "ratios": ratios(seconds, "script", "refine"),
    }


def realignment(subject: Subject, rows: Rows, rounds: int, *, batched: bool) -> dict[str, Any]:
    """Answers conditioned on their drafts: re-alignment on and off, at batch 1 or all rows together; beside them generate,
    and at batch 1 transformers' prompt lookup, which finds the draft in the prompt too."""

    def run(realign: bool) -> list[Result]:
        groups = [rows] if batched else [[row] for row in rows]
        return [result for group in groups for result in subject.refine(group, realign=realign)]

    variants: dict[str, Callable[[], Any]] = {"realign_on": lambda: run(True), "realign_off": lambda: run(False)}
    if batched:
        variants["generate"] = lambda: subject.generate(rows)
    else:
        variants["generate"] = lambda: [subject.generate([row]) for row in rows]
        variants["prompt_lookup"] = lambda: [subject.generate([row], prompt_lookup_num_tokens=10) for row in rows]
    on, off = run(True), run(False)
    seconds = interleaved(variants, rounds, warmup=0)
    return {
        "batched": batched,
        "rows": len(rows),
        "identical": sum(a.token_ids == b.token_ids for a, b in zip(on, off, strict=True)),
        "seconds": medians(seconds),
        "spread": spread(seconds),
        "work": {"realign_on": work(on), "realign_off": work(off)},
        "ratios": {name: ratios(seconds, name, "realign_on") for name in variants if name != "realign_on"},
    }


def work(results: list[Result]) -> dict[str, float]:
    """Machine-independent cost: sequential steps and token positions fed."""
    tokens = sum(len(r.token_ids) for r in results)
    steps = sum(r.steps for r in results)
    return {
        "tokens": tokens,
        "steps": steps,
        "tokens_per_step": round(tokens / max(1, steps), 2),
        "forward_tokens": sum(r.forward_tokens for r in results),
    }


def read_drafts(path: Path, count: int) -> Rows:
    """Rows with prompt and draft; also reads MT-bench rows with turns and drafts, of which it takes the first turn."""
    rows: Rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if "turns" in row:
            row = {"prompt": row["turns"][0], "draft": row["drafts"][0]}
        rows.append({"prompt": row["prompt"], "draft": row["draft"]})
    step = max(1, len(rows) // count)  # spread over the file: neighbours share a category
    return rows[::step][:count]


def random_drafts(rows: Rows, vocabulary: int) -> Rows:
    """The rows with random tokens as drafts."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "prompt_ids": row["prompt_ids"],
            "draft_ids": torch.randint(3, vocabulary, (MAX_NEW_TOKENS,), generator=generator).tolist(),
        }
        for row in rows
    ]


def conditioned(subject: Subject, rows: Rows) -> Rows:
    """Rows whose prompt holds the draft, in the template the shipped refiner was trained with."""
    return subject.ids(rows, DEFAULT_CONDITION)
