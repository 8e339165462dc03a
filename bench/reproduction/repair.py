"""Greedy-generation check of a refiner checkpoint: how much it repairs, and how much of a draft it keeps.

Similarities are difflib ratios on words. "repair" damages held-out best responses and compares draft and output
with the clean text; "real" gives real drafts, which the output should mostly keep; "demo" runs the drafts of the
demonstration.
"""

import argparse
import json
import random
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from bench.measure import RESULTS
from bench.reproduction.data import HELD_OUT, PROMPT_CHARACTERS
from bench.reproduction.examples import ExampleMaker, cut, damage, load_rows
from bench.reproduction.measure import dump, similarity
from engine import RefineOptions, Refiner
from engine.options import DEFAULT_CONDITION
from engine.refiner import DEFAULT_CHECKPOINT
from engine.text import load_tokenizer

DEMO = Path(__file__).parents[1] / "demo" / "drafts.jsonl"
LONGEST = 256
"""Tokens of a real draft that are refined."""
Rows = list[dict[str, Any]]


class Corrector:
    """A checkpoint that corrects drafts shown in its prompt."""

    def __init__(self, refiner: Refiner, tokenizer: Any) -> None:
        self.refiner, self.tokenizer = refiner, tokenizer

    def __call__(self, prompt: str, draft: str) -> str:
        """The greedy answer, of at most 1.2 times the draft's tokens and 16."""
        limit = int(1.2 * len(self.tokenizer(draft).input_ids)) + 16
        options = RefineOptions(condition=DEFAULT_CONDITION, max_new_tokens=limit)
        (result,) = self.refiner.refine([{"prompt": prompt, "draft": draft}], options)
        if result.error:
            raise result.error
        return result.text or ""


def repair(corrector: Corrector, data: Path, seed: int) -> Rows:
    """Refine damaged held-out best responses of at most 128 tokens."""
    rows = load_rows(data)
    rng = random.Random(seed)
    core = corrector.tokenizer.backend_tokenizer
    words = ExampleMaker(rows[:-HELD_OUT], core, rng).words
    results = []
    for row in rows[-HELD_OUT:]:
        clean = cut(row.best, 128, core)
        draft = damage(clean, rng, words)
        output = corrector(row.prompt[:PROMPT_CHARACTERS], draft)
        results.append({"prompt": row.prompt, "draft": draft, "output": output, "clean": clean})
    return results


def real(corrector: Corrector, drafts: Path, count: int) -> Rows:
    """Refine the first-turn drafts of ``count`` evenly spaced rows."""
    rows = [json.loads(line) for line in drafts.read_text(encoding="utf-8").splitlines()]
    core = corrector.tokenizer.backend_tokenizer
    results = []
    for row in rows[:: max(1, len(rows) // count)][:count]:
        draft = row["drafts"][0].strip()
        draft = draft[: core.encode(draft).offsets[:LONGEST][-1][1]]
        results.append({"prompt": row["turns"][0], "draft": draft, "output": corrector(row["turns"][0], draft)})
    return results


def demo(corrector: Corrector) -> Rows:
    """Refine the demonstration's drafts."""
    rows = [json.loads(line) for line in DEMO.read_text(encoding="utf-8").splitlines()]
    return [{**row, "output": corrector(row["prompt"], row["draft"])} for row in rows]


def figures(results: Rows) -> dict[str, float]:
    """Mean similarities on words of one set; of damaged drafts also how many came back better, or clean."""
    made: dict[str, float] = {
        "rows": len(results),
        "output_vs_draft": mean(words_alike(r["output"], r["draft"]) for r in results),
    }
    damaged = [r for r in results if "clean" in r and r["draft"] != r["clean"]]
    if damaged:
        intact = [r for r in results if r["draft"] == r["clean"]]
        made["damaged"] = len(damaged)
        made["draft_vs_clean"] = mean(words_alike(r["draft"], r["clean"]) for r in damaged)
        made["output_vs_clean"] = mean(words_alike(r["output"], r["clean"]) for r in damaged)
        made["cut_short"] = sum(len(r["output"].split()) < 0.8 * len(r["clean"].split()) for r in results)
        made["better"] = sum(
            words_alike(r["output"], r["clean"]) > words_alike(r["draft"], r["clean"]) for r in damaged
        )
        made["exact"] = sum(r["output"] == r["clean"] for r in damaged)
        made["intact"] = len(intact)
        made["intact_kept"] = sum(r["output"] == r["clean"] for r in intact)
    return {name: round(value, 4) for name, value in made.items()}


def words_alike(a: str, b: str) -> float:
    """Difflib's ratio on words."""
    return similarity(a.split(), b.split())


def main() -> None:
    """Evaluate a checkpoint from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: the refiner that ships)")
    parser.add_argument("--data", type=Path, help="response file of the training: its held-out rows are repaired")
    parser.add_argument("--real", type=Path, help="JSON lines with turns and drafts")
    parser.add_argument("--real-count", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 11, 21, 22, 23, 24], help="of the damage")
    parser.add_argument("--name", help="put the figures into the results of bench.reproduction, under this name")
    parser.add_argument("--results", type=Path, default=RESULTS / "reproduction.json")
    parser.add_argument("--write", type=Path, help="JSON lines file for all outputs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with Refiner.from_pretrained(args.model) as refiner:
        corrector = Corrector(refiner, load_tokenizer(args.model or DEFAULT_CHECKPOINT, False))
        sets = {"demo": demo(corrector)}
        if args.data:
            sets |= {f"repair, seed {seed}": repair(corrector, args.data, seed) for seed in args.seeds}
        if args.real:
            sets["real"] = real(corrector, args.real, args.real_count)
    made = {name: figures(results) for name, results in sets.items()}
    for name, values in made.items():
        print(name, json.dumps(values), flush=True)
    if args.name:
        kept = json.loads(args.results.read_text())
        kept.setdefault("correctors", {})[args.name] = made
        args.results.write_text(dump(kept))
    if args.write:
        lines = [json.dumps({"set": name, **row}) for name, results in sets.items() for row in results]
        args.write.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
