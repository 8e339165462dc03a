"""Trajectories for the paper's tables: real responses with a judge's rewards, all cut at the same number of tokens."""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bench.reproduction.data import HELD_OUT, PROMPT_CHARACTERS, Fields, write
from engine.options import DEFAULT_CONDITION

PROMPT_TOKENS = 200
"""Trajectories with longer prompts are not trained on: a few of them would take as long as all others."""


def cut(text: str, limit: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """The text's first ``limit`` tokens, and whether there were more."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) <= limit:
        return text, False
    return str(tokenizer.decode(ids[:limit])).rstrip("�"), True  # half a character is no text


def cut_row(row: Fields, limit: int, tokenizer: PreTrainedTokenizerBase) -> Fields:
    """A row whose responses are cut; one that was has no end of turn to learn."""
    responses = []
    for response in row["responses"]:
        text, truncated = cut(response["text"].strip(), limit, tokenizer)
        responses.append({**response, "text": text, **({"truncated": True} if truncated else {})})
    return {**row, "responses": responses}


def conditioned(row: Fields, rng: random.Random) -> Fields:
    """From one of the responses that are not the best, shown in the prompt as well, to the best."""
    best = max(row["responses"], key=lambda response: response["reward"])
    draft = rng.choice([response for response in row["responses"] if response is not best])
    prompt = DEFAULT_CONDITION.format(prompt=row["prompt"][:PROMPT_CHARACTERS], draft=draft["text"])
    return {**row, "prompt": prompt, "responses": [draft, best]}


def prepare(responses: Path, tokenizer: PreTrainedTokenizerBase, out: Path, *, limit: int, prompts: int) -> None:
    """Writes all.jsonl (every prompt that may be learned from), train.jsonl (``prompts`` of them, drawn), conditioned.jsonl
    (the same, drafts shown), and held_out.jsonl."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in responses.read_text(encoding="utf-8").splitlines()]
    rows = [cut_row(row, limit, tokenizer) for row in rows]
    known, held_out = rows[:-HELD_OUT], rows[-HELD_OUT:]
    rng = random.Random(0)
    short = [row for row in known if len(tokenizer(row["prompt"])["input_ids"]) <= PROMPT_TOKENS]
    train = rng.sample(short, min(prompts, len(short)))
    out.mkdir(parents=True, exist_ok=True)
    write(out / "all.jsonl", known)
    write(out / "held_out.jsonl", held_out)
    write(out / "conditioned.jsonl", [conditioned(row, rng) for row in train])
    write(out / "train.jsonl", train)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=Path, required=True, help="rows of prompt and responses with rewards")
    parser.add_argument("--tokenizer", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--limit", type=int, required=True, help="tokens of every response")
    parser.add_argument("--prompts", type=int, required=True, help="to train language models on")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    prepare(args.responses, tokenizer, args.out, limit=args.limit, prompts=args.prompts)


if __name__ == "__main__":
    main()
