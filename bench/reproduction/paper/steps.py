"""How the Jacobi iteration of a refiner runs on held-out prompts, from drafts of six real models and from controls."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bench.reproduction.cases import CONTROLS, Case, controlled, ranked_cases, spread
from bench.reproduction.measure import STEPS, Columns, Judge, agreement, losses
from bench.reproduction.paper.results import update
from engine import Refiner

WINDOW = 16
"""Rows that every step computes on the way to the fixed point: as many tokens can be accepted at once."""
TOKENS = 64
"""Of each answer."""
EVERY = {"given": 2, "shuffled": 4, "random": 4, "none": 4}
"""Every which of the held-out prompts."""


def judge(refiner: Refiner, tokenizer: Any, cases: Sequence[Case], tokens: int) -> Columns:
    """Steps to the fixed point, similarity to the best response on the way, and how much of it stands already."""
    cases = [case.cut(tokens) for case in cases]
    measured: Columns = {"prompt": [case.prompt for case in cases], "model": [case.model for case in cases]}
    judge = Judge(refiner, tokenizer, tokens)
    fixed = judge.refine(cases, window=WINDOW, realign=False)
    answers = [result.token_ids for result in fixed]
    measured["answer_tokens"] = [len(answer) for answer in answers]
    measured["steps"] = [result.steps for result in fixed]
    measured["default_steps"] = [result.steps for result in judge.refine(cases, concurrency=1)]
    judge.add(measured, "draft", [case.guess for case in cases], cases)
    judge.add(measured, "converged", answers, cases)
    for steps in STEPS:
        iterates = [result.token_ids for result in judge.refine(cases, steps=steps, block_size=tokens)]
        judge.add(measured, f"after_{steps}", iterates, cases)
        measured[f"settled_{steps}"] = [round(agreement(*pair), 4) for pair in zip(iterates, answers, strict=True)]
    return measured


def measure(folder: Path, data: Path, tokens: int, device: str, *, others: bool, prompts: int | None) -> dict[str, Any]:
    """Of one checkpoint: held-out losses, and the iteration; ``others``: from the drafts of controls as well."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cases = [case for case in ranked_cases(data, tokenizer) if prompts is None or case.prompt < prompts]
    with Refiner.from_pretrained(folder, device=device, max_batch_tokens=2048) as refiner:
        sets = {}
        for control in CONTROLS if others else CONTROLS[:1]:
            chosen = spread(cases, 1, every=EVERY[control] if prompts is None else 1)
            sets[control] = judge(refiner, tokenizer, controlled(chosen, control, len(tokenizer), tokens), tokens)
    return {"losses": {"plain": losses(folder, data, prompts or 20)}, "sets": {"plain": sets}}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="lm, or a run of engine.train in the folder")
    parser.add_argument("--folder", type=Path, required=True, help="of paper.sh")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--limit", type=int, required=True, help="tokens of a response in the data")
    parser.add_argument(
        "--controls", action="store_true", help="also from drafts of other prompts, random ones and none"
    )
    parser.add_argument("--prompts", type=int, help="on so many alone")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    run = args.folder / args.name
    checkpoint = run if args.name == "lm" else run / "model"
    tokens = min(TOKENS, args.limit)
    data = args.folder / "data/held_out.jsonl"
    measured = measure(checkpoint, data, tokens, args.device, others=args.controls, prompts=args.prompts)
    update(args.results, f"steps/{args.name}", measured)


if __name__ == "__main__":
    main()
