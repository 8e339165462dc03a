"""Answers to the held-out prompts: of every base, and of every refiner behind it, into one file per set of answers.

A set whose checkpoint or drafts are not there yet is left for the next call, one that is newer than they are is not made again.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bench.reproduction.data import PROMPT_CHARACTERS, Fields
from engine import RefineOptions, Refiner, Result
from engine.options import DEFAULT_CONDITION
from engine.refiner import DEFAULT_CHECKPOINT

REAL = (
    "alpaca-7b",
    "phi-2-sft",
    "vicuna-7b-v1.5",
    "gemma-7b-it",
    "OpenHermes-2.5-Mistral-7B",
    "FuseChat-Llama-3.1-8B-Instruct",
)
"""Base models whose answers come with a judge's rewards, weakest first."""
OWN = ("base", "dpo", "simpo")
"""Base models that answer here: the chat model as it is, and trained by trl."""
STEPS = (1, 2, 4, 8)
SHIPPED = "shipped"


@dataclass(frozen=True, slots=True)
class Plan:
    """One set of answers."""

    name: str
    model: str
    """Folder of the run, or SHIPPED."""
    draft: str | None = None
    """Base whose answers are the drafts; None: there are none."""
    steps: int | None = None
    condition: bool = False
    """The draft is shown in the prompt as well."""
    control: str | None = None
    """shuffled: the draft of another prompt; random: random tokens."""


def plans() -> Iterator[Plan]:
    """All of them, drafts before what is made of them, what the first tables need first."""
    yield from (Plan(name, name) for name in OWN)
    yield Plan("diffpo", "diffpo")
    yield Plan("ar", "ar")
    for base in (*OWN, *REAL):
        yield Plan(f"{base} + diffpo, 4 steps", "diffpo", base, steps=4)
    for base in (*OWN, *REAL):
        yield Plan(f"{base} + shown", "shown", base, condition=True)
    for control in ("shuffled", "random"):
        yield Plan(f"base + diffpo, 4 steps, {control}", "diffpo", "base", steps=4, control=control)
        yield Plan(f"base + shown, {control}", "shown", "base", condition=True, control=control)
    yield from (Plan(f"base + diffpo, {k} steps", "diffpo", "base", steps=k) for k in STEPS if k != 4)
    yield Plan("base + ar, 4 steps", "ar", "base", steps=4)
    for base in ("base", "alpaca-7b", "FuseChat-Llama-3.1-8B-Instruct"):
        yield Plan(f"{base} + diffpo, converged", "diffpo", base)
    for layers in (24, 18):
        yield Plan(f"layers-{layers}", f"layers-{layers}")
        yield Plan(f"base + layers-{layers}, 4 steps", f"layers-{layers}", "base", steps=4)
    yield Plan("base + shipped, shown", SHIPPED, "base", condition=True)


def checkpoint(folder: Path, model: str) -> Path:
    """Where a plan's model is, or would be."""
    if model == SHIPPED:
        return Path(DEFAULT_CHECKPOINT)
    return folder / "lm" if model == "base" else folder / model / "model"


def current(made: Path, *sources: Path) -> bool:
    """Whether a file is there and none of what it was made from is newer."""
    return made.exists() and all(made.stat().st_mtime_ns >= source.stat().st_mtime_ns for source in sources)


def sources(plan: Plan, folder: Path) -> list[Path]:
    """The files that a set of answers is made from."""
    found = [folder / "data/held_out.jsonl", checkpoint(folder, plan.model) / "model.safetensors"]
    if plan.draft and plan.draft not in REAL and plan.control != "random":
        found.append(folder / "answers" / f"{plan.draft}.jsonl")
    return found


def drafts(plan: Plan, rows: Sequence[Fields], folder: Path, tokenizer: Any, limit: int) -> list[str] | None:
    """One draft per prompt, None while there are none yet."""
    rng = random.Random(0)
    if plan.control == "random":
        ids = [[rng.randrange(4, len(tokenizer)) for _ in range(limit)] for _ in rows]
        return [str(tokenizer.decode(each, skip_special_tokens=True)) for each in ids]
    if plan.draft in REAL:
        texts = [next(r["text"] for r in row["responses"] if r["model"] == plan.draft) for row in rows]
    else:
        path = folder / "answers" / f"{plan.draft}.jsonl"
        if not path.exists():
            return None
        texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    if plan.control == "shuffled":  # every prompt gets the draft of the one behind it
        texts = [*texts[1:], texts[0]]
    return texts


def answer(refiner: Refiner, plan: Plan, rows: Sequence[Fields], texts: list[str] | None, limit: int) -> list[Result]:
    """Raises the first error of a result."""
    requests: list[dict[str, Any]] = [{"prompt": row["prompt"]} for row in rows]
    for request, text in zip(requests, texts or [], strict=texts is not None):
        request["draft"] = text
        if plan.condition:
            request["prompt"] = request["prompt"][:PROMPT_CHARACTERS]
    options = RefineOptions(
        steps=plan.steps, max_new_tokens=limit, block_size=limit, condition=DEFAULT_CONDITION if plan.condition else None,
        concurrency=1,
    )  # fmt: skip
    results = refiner.refine(requests, options)
    for result in results:
        if result.error:
            raise result.error
    return results


def write(path: Path, rows: Sequence[Fields], results: Sequence[Result], texts: list[str] | None) -> None:
    """The file has its name once it is whole."""
    lines = []
    for row, result, draft in zip(rows, results, texts or [None] * len(rows), strict=True):
        fields = {
            "prompt_id": row["prompt_id"], "text": result.text, "draft": draft, "tokens": len(result.token_ids),
            "steps": result.steps, "forward_tokens": result.forward_tokens, "converged": result.converged,
            "finish_reason": result.finish_reason,
        }  # fmt: skip
        lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of paper.sh")
    parser.add_argument("--limit", type=int, required=True, help="tokens of every answer")
    parser.add_argument("--prompts", type=int, help="answer so many alone")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    lines = (args.folder / "data/held_out.jsonl").read_text(encoding="utf-8").splitlines()[: args.prompts]
    rows = [json.loads(line) for line in lines]
    (args.folder / "answers").mkdir(exist_ok=True)
    refiner, loaded = None, None
    for plan in plans():
        path, folder = args.folder / "answers" / f"{plan.name}.jsonl", checkpoint(args.folder, plan.model)
        if not all(source.exists() for source in sources(plan, args.folder)):
            continue
        if current(path, *sources(plan, args.folder)):
            continue
        if loaded != folder:
            if refiner:
                refiner.close()
            refiner, loaded = Refiner.from_pretrained(folder, device=args.device, max_batch_tokens=1024), folder
        assert refiner is not None
        texts = (
            drafts(plan, rows, args.folder, AutoTokenizer.from_pretrained(folder), args.limit) if plan.draft else None
        )
        if plan.draft and texts is None:
            continue
        write(path, rows, answer(refiner, plan, rows, texts, args.limit), texts)
        print(f"answered: {plan.name}", flush=True)


if __name__ == "__main__":
    main()
