"""Trajectories to train and judge the shipped refiner on, from a file of ranked responses.

Three kinds, in the same format:

- plain: the prompt, and the responses as they are, with their rewards;
- repair: the prompt holds a draft as well (the ``condition`` template that the shipped refiner is used with). The draft is a
  response with a few words damaged, the target the same response without the damage;
- correction: repairs of many passages of every prompt's responses, which the shipped refiner learns from.

The last ``HELD_OUT`` prompts are kept for measurements.
"""

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bench.reproduction.examples import (
    CONDITION,
    ExampleMaker,
    Row,
    cut,
    damage,
    load_rows,
    passage,
    substitute,
    words_by_tokens,
)
from engine.trajectories.command import main as trajectories

HELD_OUT = 40
VALIDATION = 40
"""Prompts in front of the held-out ones that corrections leave out: what ships is chosen on these."""
REPAIR_TOKENS = 120
"""Longest clean text of a repair: with the end of its turn it lies inside the window of 128 tokens."""
CORRECTIONS = 16
"""Per prompt."""
CORRECTION_TOKENS = (24, 250)
"""Least and most tokens a correction is cut to: as repairs, inside a window of 256 tokens."""
INTACT = 0.15
"""Share of corrections whose draft is not damaged at all; ``damage`` leaves some more as they are."""
REPAIR = "repair"
"""Source of the rows that hold a damaged draft."""
PROMPT_CHARACTERS = 800
"""Longer prompts are cut in front of a draft."""
Fields = dict[str, Any]


def repair_row(name: str, prompt: str, shown: str, draft: str, clean: str) -> Fields:
    """A trajectory from a draft to its clean text; the prompt shows a damaged one."""
    return {
        "prompt_id": name,
        "prompt": CONDITION.format(prompt=prompt[:PROMPT_CHARACTERS], draft=shown),
        "source": REPAIR,
        "responses": [
            {"model": "damaged", "text": draft, "reward": 0.0},
            {"model": "clean", "text": clean, "reward": 1.0},
        ],
    }


def repairs(rows: Sequence[Row], core: Tokenizer, words: list[str], rng: random.Random, *, best: bool) -> list[Fields]:
    """One repair per row, of the best response or of any of them, cut to ``REPAIR_TOKENS``."""
    made = []
    for index, row in enumerate(rows):
        clean = cut(row.best if best else rng.choice((row.best, *row.others)), REPAIR_TOKENS, core)
        damaged = damage(clean, rng, words)
        made.append(repair_row(f"repair-{index:04d}", row.prompt, damaged, damaged, clean))
    return made


def corrections(rows: Sequence[Row], core: Tokenizer, words: list[str], rng: random.Random) -> list[Fields]:
    """``CORRECTIONS`` per row in random order: passages of many lengths from any response, a damaged one in the prompt.

    Behind an insertion a damaged draft has every token at another place than the clean text, and what should be written
    there cannot be told from it. The draft in the answer's place has its damage elsewhere and its tokens in place, as
    re-alignment makes a guess.
    """
    groups = words_by_tokens(words, core)
    made = []
    for index, row in enumerate(rows):
        for number in range(CORRECTIONS):
            text = rng.choice((row.best, *row.others))
            clean = cut(passage(text, rng) if rng.random() < 0.5 else text, rng.randint(*CORRECTION_TOKENS), core)
            shown = clean if rng.random() < INTACT else damage(clean, rng, words)
            draft = substitute(clean, rng, groups, core)
            made.append(repair_row(f"correction-{index:04d}-{number:02d}", row.prompt, shown, draft, clean))
    rng.shuffle(made)
    return made


def write(path: Path, rows: Iterable[Fields]) -> None:
    """One JSON line per row."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def prepare(responses: Path, tokenizer: Path, out: Path, seed: int) -> None:
    """Writes train.jsonl (plain and repair) and corrections.jsonl, and of held-out prompts plain.jsonl and repair.jsonl."""
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
    chosen_on = HELD_OUT + VALIDATION
    write(out / "corrections.jsonl", corrections(rows[:-chosen_on], core, words, random.Random(seed)))
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
