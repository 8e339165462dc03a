"""Measures every set of answers: the reward model's rewards, lengths, steps, what is left of the draft, and whether the
chat model itself would write such text. That last one is there because a reward model of this size knows good answers from
bad ones, not text from broken text.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.measure import machine
from bench.reproduction.data import Fields
from bench.reproduction.measure import history, similarity
from bench.reproduction.paper.answers import REAL, current, plans
from bench.reproduction.paper.results import update
from bench.reproduction.paper.reward import load, score
from engine.trajectories.reward_model import RewardModel

EVERY = 3
"""Text is judged by the chat model on every third prompt."""
COMMAND = "bench/reproduction/paper.sh alpaca_responses.jsonl FOLDER"
Columns = dict[str, list[Any]]


class Fluency:
    """Nats per token that a language model needs for an answer behind its prompt: low for text it could have written."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()

    @torch.inference_mode()
    def nats(self, prompt: str, text: str) -> float | None:
        """None for an empty answer."""
        chat = [{"role": "user", "content": prompt}]
        head = str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        first, answer = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (head, text))
        if not answer:
            return None
        ids = torch.tensor([[*first, *answer]], device=self.model.device)
        logits = self.model(input_ids=ids, logits_to_keep=len(answer) + 1).logits[0, :-1]
        return round(torch.nn.functional.cross_entropy(logits.float(), ids[0, len(first) :]).item(), 4)


def repeated(text: str) -> float:
    """Share of a text's trigrams of words that have stood in it before: a likely text may say one thing over and over."""
    words = text.split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return round(1 - len(set(trigrams)) / len(trigrams), 4) if trigrams else 0.0


def columns(rows: Sequence[Fields], answers: Sequence[Fields], reward: RewardModel, fluency: Fluency) -> Columns:
    """One entry per prompt."""
    texts = [answer["text"] for answer in answers]
    prompts = [row["prompt"] for row in rows]
    measured: Columns = {"prompt": list(range(len(rows))), "reward": score(reward, prompts, texts)}
    measured["characters"] = [len(text) for text in texts]
    measured["nats"] = [
        fluency.nats(prompt, text) if number % EVERY == 0 else None
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    for name in ("judge", "tokens", "steps", "forward_tokens", "converged", "finish_reason"):
        if name in answers[0]:
            measured[name] = [answer[name] for answer in answers]
    if answers[0].get("draft") is not None:
        measured["kept"] = [round(similarity(a["draft"].split(), a["text"].split()), 4) for a in answers]
    return measured


def real_answers(rows: Sequence[Fields], model: str) -> list[Fields]:
    """Those of a base model whose answers came with the data."""
    found = [next(r for r in row["responses"] if r["model"] == model) for row in rows]
    return [{"text": response["text"], "judge": response["reward"]} for response in found]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of paper.sh")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, help="of the first so many alone")
    parser.add_argument("--note", help="what a reader must know of this run")
    args = parser.parse_args()
    update(args.results, "machine", machine() | {"command": COMMAND})
    if args.note:
        update(args.results, "note", args.note)
    held_out = [json.loads(line) for line in (args.folder / "data/held_out.jsonl").read_text().splitlines()]
    held_out = held_out[: args.prompts]
    reward, fluency = load(args.folder / "reward", args.device), Fluency(args.folder / "lm", args.device)
    (args.folder / "measured").mkdir(exist_ok=True)
    for run in sorted(args.folder.glob("*/trainer_state.json")):
        update(args.results, f"training/{run.parent.name}", history(run.parent))
    for name in (*REAL, *(plan.name for plan in plans())):
        answers, kept = args.folder / "answers" / f"{name}.jsonl", args.folder / "measured" / f"{name}.json"
        if name not in REAL and not answers.exists():
            continue
        if name in REAL:
            made = real_answers(held_out, name)
        else:
            made = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
        source = args.folder / "data/held_out.jsonl" if name in REAL else answers
        if not current(kept, source, *(args.folder / part / "model.safetensors" for part in ("reward", "lm"))):
            kept.write_text(json.dumps(columns(held_out, made, reward, fluency)))
        again = [repeated(answer["text"]) for answer in made]
        update(args.results, f"answers/{name}", {**json.loads(kept.read_text()), "repeated": again})
        print(f"measured: {name}", flush=True)


if __name__ == "__main__":
    main()
