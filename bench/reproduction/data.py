"""Trajectories to train and judge the shipped refiner on, from a file of ranked responses.

Two kinds, in the same format:

- plain: the prompt, and the responses as they are, with their rewards;
- repair: the prompt holds a draft as well (the ``condition`` template that the shipped refiner is used with). The draft is a
  response with a few words damaged, the target the same response without the damage.

The last ``HELD_OUT`` prompts are kept for measurements.
"""

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bench.reproduction.examples import CONDITION, ExampleMaker, Row, cut, damage, load_rows
from engine.trajectories.command import main as trajectories

HELD_OUT = 40
REPAIR_TOKENS = 120
"""Longest clean text of a repair: with the end of its turn it lies inside the window of 128 tokens."""
REPAIR = "repair"
"""Source of the rows that hold a damaged draft."""
PROMPT_CHARACTERS = 800
"""Longer prompts are cut in front of a draft."""
Fields = dict[str, Any]


def repair_row(name: str, prompt: str, clean: str, damaged: str) -> Fields:
    """A trajectory of a damaged draft, shown in the prompt, to its clean text."""
    return {
        "prompt_id": name,
        "prompt": CONDITION.format(prompt=prompt[:PROMPT_CHARACTERS], draft=damaged),
        "source": REPAIR,
        "responses": [
            {"model": "damaged", "text": damaged, "reward": 0.0},
            {"model": "clean", "text": clean, "reward": 1.0},
        ],
    }


def repairs(rows: Sequence[Row], core: Tokenizer, words: list[str], rng: random.Random, *, best: bool) -> list[Fields]:
    """One repair per row, of the best response or of any of them, cut to ``REPAIR_TOKENS``."""
    made = []
    for index, row in enumerate(rows):
        clean = cut(row.best if best else rng.choice((row.best, *row.others)), REPAIR_TOKENS, core)
        made.append(repair_row(f"repair-{index:04d}", row.prompt, clean, damage(clean, rng, words)))
    return made


def write(path: Path, rows: Iterable[Fields]) -> None:
    """One JSON line per row."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def prepare(responses: Path, tokenizer: Path, out: Path, seed: int) -> None:
    """Writes train.jsonl (both kinds) and train-repair.jsonl, and of held-out prompts plain.jsonl and repair.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    built = out / "trajectories.jsonl"
    status = trajectories(["build", "--prompts", str(responses), "--output", str(built), "--overwrite"])
    if status:
        raise SystemExit(status)
    plain = [json.loads(line) for line in built.read_text(encoding="utf-8").splitlines()]
    rows = load_rows(built)
    core = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    rng = random.Random(seed)
    words = ExampleMaker(rows[:-HELD_OUT], core, rng).words
    train = [*plain[:-HELD_OUT], *repairs(rows[:-HELD_OUT], core, words, rng, best=False)]
    rng.shuffle(train)
    write(out / "train.jsonl", train)
    write(out / "train-repair.jsonl", (row for row in train if row.get("source") == REPAIR))
    write(out / "plain.jsonl", plain[-HELD_OUT:])
    write(out / "repair.jsonl", repairs(rows[-HELD_OUT:], core, words, random.Random(7), best=True))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=Path, required=True, help="rows of prompt and responses with rewards")
    parser.add_argument("--tokenizer", type=Path, required=True, help="checkpoint folder that holds tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prepare(args.responses, args.tokenizer, args.out, args.seed)


if __name__ == "__main__":
    main()
