"""Greedy-generation check of a refiner checkpoint: how much it repairs, and how much of a draft it keeps.

Similarities are difflib ratios on words. "repair" damages held-out best responses and compares draft and output
with the clean text; "real" gives real drafts, which the output should mostly keep; "demo" runs the drafts of the
demonstration.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tokenizers import Tokenizer

from bench.measure import RESULTS
from bench.reproduction.data import HELD_OUT, PROMPT_CHARACTERS, VALIDATION
from bench.reproduction.examples import ExampleMaker, cut, damage, load_rows
from bench.reproduction.measure import Columns, dump
from engine import RefineOptions, Refiner
from engine.evaluate.overlap import word_similarity
from engine.options import DEFAULT_CONDITION
from engine.refiner import DEFAULT_CHECKPOINT
from engine.text import load_tokenizer

DEMO = Path(__file__).parents[1] / "demo" / "drafts.jsonl"
LONGEST = 256
"""Tokens of a real draft that are refined."""
REAL_DRAFTS = 20
Row = dict[str, Any]
Rows = list[Row]


class Corrector:
    """A checkpoint that corrects drafts shown in its prompt."""

    def __init__(self, refiner: Refiner, tokenizer: Any) -> None:
        self.refiner, self.tokenizer = refiner, tokenizer

    def __call__(self, row: Row) -> Row:
        """The row with the greedy answer, of at most 1.2 times the draft's tokens and 16, its length and steps."""
        limit = int(1.2 * len(self.tokenizer(row["draft"]).input_ids)) + 16
        options = RefineOptions(condition=DEFAULT_CONDITION, max_new_tokens=limit)
        (result,) = self.refiner.refine([{"prompt": row["prompt"], "draft": row["draft"]}], options)
        if result.error:
            raise result.error
        return {**row, "output": result.text or "", "tokens": len(result.token_ids), "steps": result.steps}


def damaged(data: Path, core: Tokenizer, seeds: Sequence[int], *, validation: bool = False) -> Rows:
    """Best responses of at most 128 tokens, damaged once per seed: of held-out prompts, or of those to choose on."""
    rows = load_rows(data)
    words = ExampleMaker(rows[:-HELD_OUT], core, random.Random(0)).words
    chosen = rows[-HELD_OUT - VALIDATION : -HELD_OUT] if validation else rows[-HELD_OUT:]
    made = []
    for seed in seeds:
        rng = random.Random(seed)
        for number, row in enumerate(chosen):
            clean = cut(row.best, 128, core)
            draft = damage(clean, rng, words)
            made.append({"number": number, "prompt": row.prompt[:PROMPT_CHARACTERS], "draft": draft, "clean": clean})
    return made


def real(path: Path, core: Tokenizer) -> Rows:
    """The first-turn drafts of ``REAL_DRAFTS`` evenly spaced rows."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    made = []
    for number, row in enumerate(rows[:: max(1, len(rows) // REAL_DRAFTS)][:REAL_DRAFTS]):
        draft = row["drafts"][0].strip()
        draft = draft[: core.encode(draft).offsets[:LONGEST][-1][1]]
        made.append({"number": number, "prompt": row["turns"][0], "draft": draft})
    return made


def demo() -> Rows:
    """The demonstration's drafts."""
    rows = [json.loads(line) for line in DEMO.read_text(encoding="utf-8").splitlines()]
    return [{"number": number, **row} for number, row in enumerate(rows)]


def first(rows: Rows, prompts: int | None) -> Rows:
    """Those of the first prompts, or all."""
    return [row for row in rows if prompts is None or row["number"] < prompts]


def columns(results: Rows) -> Columns:
    """What is kept of one set, an entry per draft; figures of repairs are None for undamaged drafts, ``kept`` for others."""
    made: Columns = {
        "prompt": [r["number"] for r in results],
        "output_vs_draft": [words_alike(r["output"], r["draft"]) for r in results],
        "answer_tokens": [r["tokens"] for r in results],
        "steps": [r["steps"] for r in results],
    }
    if all("clean" in r for r in results):
        changed = [r["draft"] != r["clean"] for r in results]
        before = [words_alike(r["draft"], r["clean"]) for r in results]
        after = [words_alike(r["output"], r["clean"]) for r in results]
        whole = [r["output"] == r["clean"] for r in results]
        made["draft_vs_clean"] = only(before, changed)
        made["output_vs_clean"] = only(after, changed)
        made["better"] = only([b < a for b, a in zip(before, after, strict=True)], changed)
        made["repaired"] = only(whole, changed)
        made["kept"] = only(whole, [not it for it in changed])
        made["cut_short"] = [len(r["output"].split()) < 0.8 * len(r["clean"].split()) for r in results]
    return made


def only(values: Sequence[Any], where: Sequence[bool]) -> list[Any]:
    """The values that count; None for the others."""
    return [value if counts else None for value, counts in zip(values, where, strict=True)]


def words_alike(a: str, b: str) -> float:
    """Difflib's ratio on words."""
    return round(word_similarity(a, b), 4)


def summary(made: Columns) -> dict[str, float]:
    """Mean or, of what is true or false, number in each column."""
    summed = {}
    for name, values in made.items():
        known = [value for value in values if value is not None]
        if name != "prompt" and known:
            summed[name] = sum(known) if isinstance(known[0], bool) else round(mean(known), 4)
    return {"rows": len(made["prompt"]), **summed}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: the refiner that ships)")
    parser.add_argument("--data", type=Path, help="response file of the training: its held-out rows are repaired")
    parser.add_argument("--validation", action="store_true", help="repair the rows in front of them, to choose on")
    parser.add_argument("--real", type=Path, help="JSON lines with turns and drafts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 11, 21, 22, 23, 24], help="of the damage")
    parser.add_argument("--prompts", type=int, help="refine drafts of so many prompts of every set alone")
    parser.add_argument("--name", help="put the figures into the results of bench.reproduction, under this name")
    parser.add_argument("--results", type=Path, default=RESULTS / "reproduction.json")
    parser.add_argument("--write", type=Path, help="JSON lines file for all outputs")
    return parser.parse_args()


def main() -> None:
    """Evaluate a checkpoint from the command line."""
    args = parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(args.model or DEFAULT_CHECKPOINT, False)
    core = tokenizer.backend_tokenizer
    drafts = {"demo": demo()}
    if args.data:
        drafts["repair"] = damaged(args.data, core, args.seeds, validation=args.validation)
    if args.real:
        drafts["real"] = real(args.real, core)
    with Refiner.from_pretrained(args.model) as refiner:
        corrector = Corrector(refiner, tokenizer)
        sets = {name: [corrector(row) for row in first(rows, args.prompts)] for name, rows in drafts.items()}
    made = {name: columns(results) for name, results in sets.items()}
    for name, values in made.items():
        print(name, json.dumps(summary(values)), flush=True)
    if args.name:
        kept = json.loads(args.results.read_text()) if args.results.exists() else {"runs": {}}
        kept.setdefault("correctors", {})[args.name] = made
        args.results.write_text(dump(kept))
    if args.write:
        lines = [json.dumps({"set": name, **row}) for name, results in sets.items() for row in results]
        args.write.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
