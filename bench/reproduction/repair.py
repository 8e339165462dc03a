"""Greedy-generation check of a refiner checkpoint: how much it repairs, and how much of a draft it keeps.

Similarities are difflib ratios on words. "repair" damages held-out best responses and compares draft and output
with the clean text; "real" gives real drafts, which the output should mostly keep; "demo" runs the drafts of the
demonstration.
"""

import argparse
import json
import random
from difflib import SequenceMatcher
from pathlib import Path
from statistics import mean

import torch
from refiner_data import CONDITION, ExampleMaker, cut, damage, load_rows
from train_refiner import HELD_OUT
from transformers import AutoModelForCausalLM, AutoTokenizer


def similarity(a: str, b: str) -> float:
    """Difflib ratio of two texts on words."""
    return SequenceMatcher(None, a.split(), b.split(), autojunk=False).ratio()


class Refiner:
    """A checkpoint that refines one draft at a time with greedy search."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, prompt: str, draft: str) -> str:
        """Refine ``draft``."""
        chat = [{"role": "user", "content": CONDITION.format(prompt=prompt, draft=draft)}]
        inputs = self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        limit = int(1.2 * len(self.tokenizer(draft).input_ids)) + 16
        output = self.model.generate(**inputs, max_new_tokens=limit, do_sample=False)
        return self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def repair(refiner: Refiner, data: Path, seed: int) -> list[dict]:
    """Refine damaged held-out best responses of at most 128 tokens."""
    rows = load_rows(data)
    rng = random.Random(seed)
    core = refiner.tokenizer.backend_tokenizer
    words = ExampleMaker(rows[:-HELD_OUT], core, rng).words
    results = []
    for row in rows[-HELD_OUT:]:
        clean = cut(row.best, 128, core)
        draft = damage(clean, rng, words)
        output = refiner(row.prompt[:800], draft)
        results.append({"prompt": row.prompt, "draft": draft, "output": output, "clean": clean})
    return results


def real(refiner: Refiner, drafts: Path, count: int) -> list[dict]:
    """Refine the first-turn drafts of ``count`` evenly spaced rows."""
    rows = [json.loads(line) for line in drafts.read_text(encoding="utf-8").splitlines()]
    core = refiner.tokenizer.backend_tokenizer
    results = []
    for row in rows[:: max(1, len(rows) // count)][:count]:
        draft = row["drafts"][0].strip()
        draft = draft[: core.encode(draft).offsets[:256][-1][1]]
        results.append({"prompt": row["turns"][0], "draft": draft, "output": refiner(row["turns"][0], draft)})
    return results


def demo(refiner: Refiner) -> list[dict]:
    """Refine the demonstration's drafts."""
    lines = (Path(__file__).parent / "drafts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{**row, "output": refiner(row["prompt"], row["draft"])} for row in rows]


def report(name: str, results: list[dict]) -> None:
    """Print the figures of one set."""
    figures = {"rows": len(results), "output_vs_draft": mean(similarity(r["output"], r["draft"]) for r in results)}
    damaged = [r for r in results if "clean" in r and r["draft"] != r["clean"]]
    if damaged:
        figures["damaged_rows"] = len(damaged)
        figures["draft_vs_clean"] = mean(similarity(r["draft"], r["clean"]) for r in damaged)
        figures["output_vs_clean"] = mean(similarity(r["output"], r["clean"]) for r in damaged)
        figures["exact"] = mean(r["output"] == r["clean"] for r in damaged)
        intact = [r for r in results if r["draft"] == r["clean"]]
        figures["intact_kept"] = f"{sum(r['output'] == r['clean'] for r in intact)}/{len(intact)}"
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}
    print(name, json.dumps(rounded), flush=True)


def main() -> None:
    """Evaluate a checkpoint from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="response file of the training: its held-out rows are repaired")
    parser.add_argument("--real", type=Path, help="JSON lines with turns and drafts")
    parser.add_argument("--real-count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--write", type=Path, help="JSON lines file for all outputs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    refiner = Refiner(args.model)
    sets = {"demo": demo(refiner)}
    report("demo", sets["demo"])
    if args.data:
        sets["repair"] = repair(refiner, args.data, args.seed)
        report("repair", sets["repair"])
    if args.real:
        sets["real"] = real(refiner, args.real, args.real_count)
        report("real", sets["real"])
    if args.write:
        lines = [json.dumps({"set": name, **row}) for name, results in sets.items() for row in results]
        args.write.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
