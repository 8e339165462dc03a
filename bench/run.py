"""Whole refinements against generate, prompt lookup and the public script, and forward passes, as bench/results/cpu.json.

python -m bench.run [--drafts FILE.jsonl] [--only forward,script,generate,realign] [--quick]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.bench_forward import measure_forward
from bench.bench_refine import Subject, against_generate, against_script, conditioned, read_drafts, realignment
from bench.measure import machine, save
from bench.models import random_llama_135m
from engine.refiner import DEFAULT_CHECKPOINT

STAGES = ("forward", "script", "generate", "realign")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafts", type=Path, default=Path(__file__).parent / "demo" / "drafts.jsonl")
    parser.add_argument("--only", default=",".join(STAGES), help="stages to run, separated by commas")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and rows: a check that everything runs")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "diffpo-bench")
    parser.add_argument("--name", default="cpu", help="file name under bench/results/")
    args = parser.parse_args()
    stages = args.only.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"unknown stages {sorted(unknown)}, known are {STAGES}")
    models = {"shipped": DEFAULT_CHECKPOINT, "llama-135m-random": random_llama_135m(args.scratch / "llama-135m")}
    results: dict[str, Any] = {"machine": machine(), "drafts": args.drafts.name, "max_new_tokens": 256}
    for name, folder in models.items():
        print(f"== {name}", flush=True)
        results[name] = measure(name, folder, stages, args.drafts, quick=args.quick)
        save(args.name, results)


def measure(name: str, folder: Path, stages: list[str], drafts: Path, *, quick: bool) -> dict[str, Any]:
    """The chosen stages on one checkpoint; each is printed as soon as it is known."""
    shipped = name == "shipped"
    rounds = 1 if quick else 5 if shipped else 3
    out: dict[str, Any] = {}

    def note(stage: str, value: Any) -> None:
        out[stage] = value
        print(f"{stage}: {value}", flush=True)

    if "forward" in stages:
        note("forward", measure_forward(folder, (1, 16, 64, 256), 3 if quick else 15))
    subject = Subject(folder)
    rows = read_drafts(drafts, 4 if quick else 16)
    if shipped:
        unconditioned, edited = subject.ids(rows, None), conditioned(subject, rows)
    else:
        # no tokenizer: random ids of the same lengths
        torch.manual_seed(0)
        lengths = [(len(r["prompt"]) // 4 + 8, len(r["draft"]) // 4 + 1) for r in rows]
        unconditioned = [
            {"prompt_ids": torch.randint(3, 49152, (p,)).tolist(), "draft_ids": torch.randint(3, 49152, (d,)).tolist()}
            for p, d in lengths
        ]
    if "script" in stages:
        note("script", against_script(subject, unconditioned[: 4 if shipped and not quick else 1], 1))
    if "generate" in stages:
        note("generate_batch_1", against_generate(subject, unconditioned[:1], rounds))
        note("generate_batch_16", against_generate(subject, unconditioned, rounds))
    if "realign" in stages and shipped:
        note("realign_batch_1", realignment(subject, edited, 1 if quick else 3, batched=False))
        note("realign_batch_16", realignment(subject, edited, 1 if quick else 3, batched=True))
    subject.refiner.close()
    return out


if __name__ == "__main__":
    main()
