"""Measures checkpoints on held-out prompts: Jacobi steps, similarity to the best response step by step, losses.

Every figure is kept per case in bench/results/reproduction.json, from which ``bench.reproduction.table`` makes the tables.
Steps and similarities do not depend on how busy the machine is.
"""

import argparse
import json
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.measure import RESULTS
from bench.reproduction.cases import CONTROLS, Case, controlled, mt_bench_cases, ranked_cases, spread
from engine import RefineOptions, Refiner, Result
from engine.evaluate.overlap import agreement, similarity
from engine.training import TrajectoryCollator, rank, train_step
from engine.trajectories.dataset import load

STEPS = (1, 2, 4, 8)
TRAINED_TOKENS = 128
"""Response tokens that training is about (N); the paper has 256."""
JUDGED_TOKENS = 64
"""Response tokens that are refined here: the guess of every one of them is computed anew in every step."""
Columns = dict[str, list[Any]]


class Judge:
    """Similarities to the best response, on tokens and on words."""

    def __init__(self, refiner: Refiner, tokenizer: Any, tokens: int) -> None:
        self.refiner, self.tokenizer, self.tokens = refiner, tokenizer, tokens

    def add(self, columns: Columns, name: str, answers: Sequence[list[int]], cases: Sequence[Case]) -> None:
        """Two columns, ``name`` with _tokens and _words, of cases that have a target."""
        if not all(case.target for case in cases):
            return
        pairs = list(zip(answers, cases, strict=True))
        columns[f"{name}_tokens"] = [round(similarity(answer, case.target), 4) for answer, case in pairs]
        columns[f"{name}_words"] = [
            round(similarity(self._words(answer), self._words(case.target)), 4) for answer, case in pairs
        ]

    def _words(self, ids: list[int]) -> list[str]:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).split()

    def refine(self, cases: Sequence[Case], **options: Any) -> list[Result]:
        """Raises the first error of a result."""
        requests = [{"prompt_ids": case.prompt_ids, "draft_ids": case.guess} for case in cases]
        results = self.refiner.refine(requests, RefineOptions(max_new_tokens=self.tokens, **options))
        for result in results:
            if result.error:
                raise result.error
        return results

    def judge(self, cases: Sequence[Case], *, iterates: bool = True) -> Columns:
        """Columns with one entry per case; ``iterates``: also of the answers after each of ``STEPS`` steps."""
        cases = [case.cut(self.tokens) for case in cases]
        columns: Columns = {"prompt": [case.prompt for case in cases], "model": [case.model for case in cases]}
        fixed = self.refine(cases, window=self.tokens, realign=False)
        defaults = self.refine(cases, concurrency=1)  # as if each were the only request
        answers = [result.token_ids for result in fixed]
        assert answers == [result.token_ids for result in defaults]
        columns["answer_tokens"] = [len(answer) for answer in answers]
        columns["steps"] = [result.steps for result in fixed]
        columns["default_steps"] = [result.steps for result in defaults]
        self.add(columns, "converged", answers, cases)
        self.add(columns, "draft", [case.guess for case in cases], cases)
        for steps in STEPS if iterates else ():
            iterate = [result.token_ids for result in self.refine(cases, steps=steps, block_size=self.tokens)]
            self.add(columns, f"after_{steps}", iterate, cases)
            columns[f"settled_{steps}"] = [round(agreement(*pair), 4) for pair in zip(iterate, answers, strict=True)]
        return columns


@torch.no_grad()
def losses(folder: Path, path: Path, prompts: int | None = None) -> Columns:
    """Per trajectory of a file, in nats per token: cross entropy of the best response, and divergence given every draft."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    columns: Columns = {"prompt": [], "ar": [], "consistency": [], "agrees": []}
    for number, trajectory in enumerate(islice(load(str(path), tokenizer), prompts)):
        collate = TrajectoryCollator(tokenizer.pad_token_id, drafts=len(rank(trajectory)), window=TRAINED_TOKENS)
        out = train_step(model, collate([trajectory]), omega=1.0, return_stats=True)
        columns["prompt"].append(number)
        columns["ar"].append(round(out.ar.item(), 4))
        paired = bool(out.pair_count)
        columns["consistency"].append(round(out.consistency.item(), 4) if paired else None)
        agrees = out.stats.argmax_agrees.float().mean().item() if out.stats is not None and paired else None
        columns["agrees"].append(None if agrees is None else round(agrees, 4))
    return columns


def measure(folder: Path, data: Path, mt_bench: Path | None, prompts: int | None = None) -> dict[str, Any]:
    """All figures of one checkpoint; ``prompts``: on the first ones of every set alone."""

    def first(cases: list[Case]) -> list[Case]:
        return [case for case in cases if prompts is None or case.prompt < prompts]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    measured: dict[str, Any] = {"losses": {}, "sets": {}}
    plain, repair = (first(ranked_cases(data / f"{name}.jsonl", tokenizer)) for name in ("plain", "repair"))
    sets = measured["sets"]
    with Refiner.from_pretrained(folder, max_batch_tokens=4096) as refiner:
        judge = Judge(refiner, tokenizer, JUDGED_TOKENS)
        few = spread(plain, 1, every=2)
        sets["plain"] = {"given": judge.judge(spread(plain, 2))}
        for control in CONTROLS[1:]:
            sets["plain"][control] = judge.judge(controlled(few, control, len(tokenizer), JUDGED_TOKENS))
        if mt_bench:
            cases = spread(first(mt_bench_cases(mt_bench, tokenizer)), 1, every=2)
            sets["mt_bench"] = {"given": judge.judge(cases, iterates=False)}
        judge = Judge(refiner, tokenizer, TRAINED_TOKENS)
        sets["repair"] = {"given": judge.judge(repair)}
    for name in ("plain", "repair"):
        measured["losses"][name] = losses(folder, data / f"{name}.jsonl", prompts)
    return measured


def history(run: Path) -> dict[str, Any]:
    """Settings and loss curve of a run of ``engine.train``."""
    record = json.loads((run / "run.job").read_text().splitlines()[0])
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    points = [entry for entry in log if "ar" in entry]
    curve = {name: [round(entry[name], 4) for entry in points] for name in ("step", "ar", "consistency")}
    return {"settings": record["settings"], "curve": curve}


def main() -> None:
    """Command line: measures checkpoints and puts them into the results, beside those already there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "name in the tables; folder of a checkpoint, or of a run of engine.train"
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=FOLDER", help=text)
    parser.add_argument("--data", type=Path, required=True, help="folder written by bench.reproduction.data")
    parser.add_argument("--mt-bench", type=Path, help="JSON lines with turns and drafts: steps on these as well")
    parser.add_argument("--prompts", type=int, help="measure on so many prompts of every set alone (3 or more)")
    parser.add_argument("--results", type=Path, default=RESULTS / "reproduction.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(args.results.read_text()) if args.results.exists() else {"runs": {}}
    for item in args.checkpoints:
        name, _, folder = item.partition("=")
        trained = (Path(folder) / "model").exists()
        checkpoint = Path(folder, "model") if trained else Path(folder)
        measured = measure(checkpoint, args.data, args.mt_bench, args.prompts)
        results["runs"][name] = (history(Path(folder)) if trained else {}) | measured
        args.results.write_text(dump(results))
        print(f"measured {name}", flush=True)


def dump(results: dict[str, Any]) -> str:
    """JSON with a line per list of numbers."""
    lists = re.compile(r"\[[^][{}]*\]")
    return lists.sub(lambda match: " ".join(match[0].split()), json.dumps(results, indent=1)) + "\n"


if __name__ == "__main__":
    main()
