"""Trains a small language model and keeps hidden states of it, for measurements that random ones would mislead.

    python -m bench.trained_states --responses FILE.jsonl --tokenizer tokenizer.model --out FOLDER [--steps N]

Random hidden states give every word about the same probability; those of a trained model give most words next to none, which
is what a sparse backward lives on. ``--responses`` holds rows {"prompt", "responses": [{"text", "reward"}, ..]}, the last
``--held-out`` of which are not trained on; ``--tokenizer`` is a file of tiktoken ranks, such as Llama 3's, whose 128,256 words
make the head (needs ``pip install tiktoken``). The model is small where that costs the head nothing: two layers of width 256,
hashed bigrams and trigrams, and a last layer that widens to the head's hidden size.

The softmax of training is over the words of the batch and others drawn from the whole vocabulary, which stand for all the
rest with the weight of their probability to be drawn: an estimate of the full one at a thirtieth of its cost. A third of the
draws is uniform, so that the rows of words that never occur are pushed away as they are in a real model. What is reported
at the end is over all words.

There are two rounds. Behind the first, FOLDER/states.safetensors gets rows of the held-out prompts: minutes of training make
a poor model of them, unsure of most words. The second learns the first ``--rehearsed`` prompts by heart, and
FOLDER/states-of-rehearsed-text.safetensors gets rows of these, where the model is about as sure as a large one is of any
text. Both have target and draft [N, D] (the hidden states that predict the same index of the best response, given the best
response or another one: row n of one teaches row n of the other), labels [N] and weight [V, D]; bfloat16.
"""

import argparse
import base64
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

# How Llama 3 cuts a text before its byte pairs are merged, and its special words in the order of their ids.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = 256
BEGIN, HEADER, END_OF_HEADER, END_OF_TURN = 0, 6, 7, 9
WIDTH, LAYERS, HEADS, BUCKETS = 256, 2, 4, 1 << 16
WINDOW = 256
"""Response tokens; N in the paper."""


class Llama3Tokenizer:
    """Chats as token ids."""

    def __init__(self, path: Path) -> None:
        from tiktoken import Encoding

        lines = path.read_bytes().splitlines()
        ranks = {base64.b64decode(word): int(rank) for word, rank in (line.split() for line in lines if line)}
        self._encoding = Encoding(path.name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        self._special = len(ranks)
        self.size = len(ranks) + SPECIAL

    def turn(self, role: str, text: str | None) -> list[int]:
        """One turn; without a text up to where it begins."""
        s, encode = self._special, self._encoding.encode_ordinary
        opened = [s + HEADER, *encode(role), s + END_OF_HEADER, *encode("\n\n")]
        return opened if text is None else [*opened, *encode(text), s + END_OF_TURN]

    def chat(self, prompt: str) -> list[int]:
        """Up to where the assistant begins."""
        return [self._special + BEGIN, *self.turn("user", prompt), *self.turn("assistant", None)]

    def answer(self, text: str) -> list[int]:
        return [*self._encoding.encode_ordinary(text), self._special + END_OF_TURN]


class Block(nn.Module):
    """Causal attention with rotary positions, and a gated layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_up, self.down = nn.Linear(WIDTH, 6 * WIDTH, bias=False), nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = (
            t * cos + torch.cat((-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]), -1) * sin for t in (q, k)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    """Token ids [B, L] -> hidden states [B, L, D]; ``head`` [V, D] has no tie to the embeddings."""

    def __init__(self, counts: Tensor, d: int) -> None:
        """``counts`` [V] of the words: the head begins with their frequencies."""
        super().__init__()
        vocabulary = len(counts)
        # sparse: an update touches the rows that took part
        self.tokens = nn.Embedding(vocabulary, WIDTH, sparse=True)
        self.ngrams = nn.Embedding(2 * BUCKETS, WIDTH, sparse=True)
        self.head = nn.Embedding(vocabulary, d, sparse=True)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.widen, self.mix = nn.Linear(WIDTH, d, bias=False), nn.Linear(d, d, bias=False)
        self.norm, self.common = nn.RMSNorm(d), nn.Parameter(8 * F.normalize(torch.randn(d), dim=0))
        for table, std in ((self.tokens, 0.2), (self.ngrams, 0.1), (self.head, 0.01)):
            nn.init.normal_(table.weight, std=std)
        with torch.no_grad():
            self.head.weight += (counts + 0.1).log()[:, None] * self.common / 64

    def forward(self, ids: Tensor) -> Tensor:
        before, earlier = (F.pad(ids, (n, 0))[:, : ids.shape[1]] for n in (1, 2))
        bigram = ids * 1000003 + before * 7919
        grams = torch.stack((bigram % BUCKETS, BUCKETS + (bigram + earlier * 104729) // 7 % BUCKETS))
        x = self.tokens(ids) + self.ngrams(grams).sum(0)
        cos, sin = rotation(ids.shape[1], WIDTH // HEADS)
        for block in self.blocks:
            x = block(x, cos, sin)
        wide = self.widen(x)
        return self.norm(wide + self.mix(F.gelu(wide))) + self.common


def rotation(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, width] of rotary positions."""
    angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    return angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)


def sampled_loss(hidden: Tensor, labels: Tensor, head: nn.Embedding, proposal: Tensor, draws: int) -> Tensor:
    """Cross entropy over the words of the batch and ``draws`` from ``proposal`` [V] that stand for all others."""
    present, places = labels.unique(return_inverse=True)
    drawn = torch.multinomial(proposal, draws, replacement=True)
    shift = -(draws * proposal[drawn]).log()
    shift[torch.isin(drawn, present)] = -torch.inf
    rows = head(torch.cat((present, drawn)))
    return F.cross_entropy(F.linear(hidden, rows, torch.cat((torch.zeros(len(present)), shift))), places)


def train(model: Model, stream: Tensor, proposal: Tensor, until: float, args: argparse.Namespace) -> None:
    """Adam with a warm-up and a cosine until ``steps`` or ``minutes`` are over or the mean loss is ``until``."""
    steps, rows, length = args.steps, args.batch, args.length
    tables = [model.tokens.weight, model.ngrams.weight, model.head.weight]
    dense = [p for p in model.parameters() if all(p is not table for table in tables)]
    optimizers = (torch.optim.AdamW(dense, 2e-3, betas=(0.9, 0.98)), torch.optim.SparseAdam(tables, 2e-3))
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.empty(0, dtype=torch.int64)
    start, mean = time.perf_counter(), 0.0
    for step in range(steps):
        seconds = time.perf_counter() - start
        progress = max(step / steps, seconds / (60 * args.minutes))
        if step % 10 == 0:
            print(f"step {step}, {progress:.0%}, {seconds:.0f} s, loss {mean:.3f}", flush=True)
        if progress >= 1 or (step and mean < until):
            break
        if len(order) < rows:
            order = torch.randperm((len(stream) - 1) // length, generator=generator) * length
        starts, order = order[:rows], order[rows:]
        window = stream[starts[:, None] + torch.arange(length + 1)]
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 30) * math.cos(math.pi / 2 * progress) ** 2
            optimizer.zero_grad()
        hidden = model(window[:, :-1]).flatten(0, 1)
        loss = sampled_loss(hidden, window[:, 1:].flatten(), model.head, proposal, args.draws)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        mean = loss.item() if step == 0 else 0.8 * mean + 0.2 * loss.item()


def stream_of(rows: list[dict[str, Any]], tokenizer: Llama3Tokenizer, seed: int) -> Tensor:
    """All chats behind one another, in a random order."""
    texts = [tokenizer.chat(row["prompt"]) + tokenizer.answer(r["text"]) for row in rows for r in row["responses"]]
    random.Random(seed).shuffle(texts)
    return torch.tensor([token for text in texts for token in text])


@dataclass(frozen=True)
class States:
    """Rows that predict the same indices of a response, given its own tokens or those of another one."""

    target: Tensor
    """[N, D]."""
    draft: Tensor
    """[N, D]."""
    labels: Tensor
    """[N]."""


@torch.no_grad()
def states(model: Model, rows: list[dict[str, Any]], tokenizer: Llama3Tokenizer, count: int) -> States:
    """The first ``count`` rows of the pairs (best response, one of the others) of ``rows``, in their order."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    draw = random.Random(0)
    for row in rows:
        *others, best = sorted(row["responses"], key=lambda response: response["reward"])
        prompt = tokenizer.chat(row["prompt"])
        target, draft = (tokenizer.answer(r["text"])[:WINDOW] for r in (best, draw.choice(others)))
        draft = (draft + [0] * len(target))[: len(target)]
        first = next((i for i, (a, b) in enumerate(zip(target, draft, strict=True)) if a != b), len(target)) + 1
        # index i of the response is predicted by the row before it
        reading = slice(len(prompt) - 1 + first, -1)
        hidden = [model(torch.tensor([prompt + response]))[0, reading] for response in (target, draft)]
        parts.append((hidden[0], hidden[1], torch.tensor(target[first:], dtype=torch.int64)))
        if sum(len(labels) for _, _, labels in parts) >= count:
            break
    target_hidden, draft_hidden, labels = (torch.cat(tensors)[:count] for tensors in zip(*parts, strict=True))
    return States(target_hidden, draft_hidden, labels)


@torch.no_grad()
def describe(found: States, head: Tensor, unseen: Tensor) -> dict[str, Any]:
    """How sure the model is, over the whole vocabulary; ``unseen`` marks the words that never occurred in training."""
    columns: dict[str, list[Tensor]] = {"loss": [], "top-1": [], "entropy": [], "unseen": [], "words": [], "KL": []}
    for h, g, y in zip(found.target.split(128), found.draft.split(128), found.labels.split(128), strict=True):
        log_p, log_q = (h @ head.T).log_softmax(-1), (g @ head.T).log_softmax(-1)
        p = log_p.exp()
        columns["loss"].append(F.nll_loss(log_p, y, reduction="none"))
        columns["top-1"].append(p.amax(-1))
        columns["entropy"].append(-(p * log_p).sum(-1))
        columns["unseen"].append(p[:, unseen].sum(-1))
        columns["words"].append((p > 1e-5).sum(-1).float())
        columns["KL"].append((p * (log_p - log_q)).sum(-1))
    values = {name: torch.cat(tensors) for name, tensors in columns.items()}
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    distance = (found.draft - found.target).norm(dim=-1) / found.target.norm(dim=-1)
    return {
        "rows": len(found.labels),
        "loss": values["loss"].mean().item(),
        "mean top-1 probability": values["top-1"].mean().item(),
        "quantiles 10, 25, 50, 75, 90 %": {
            name: [round(v, 4) for v in values[name].quantile(quantiles).tolist()]
            for name in ("top-1", "entropy", "KL")
        },
        "mean probability of words never seen": values["unseen"].mean().item(),
        "mean number of words above 1e-5": values["words"].mean().item(),
        "median relative distance of the streams": distance.median().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held-out", type=int, default=40, help="rows at the end of the file that are not trained on")
    parser.add_argument("--rehearsed", type=int, default=16, help="rows at its beginning that are learned by heart")
    parser.add_argument("--until", type=float, default=1.3, help="nats per token at which these are known well enough")
    parser.add_argument("--steps", type=int, default=1500, help="of each of the two rounds of training")
    parser.add_argument("--minutes", type=float, default=12, help="ends a round before --steps where they take longer")
    parser.add_argument("--batch", type=int, default=4, help="windows of --length tokens per step")
    parser.add_argument("--draws", type=int, default=3072, help="words that stand for all that a batch does not have")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size of the head")
    parser.add_argument("--rows", type=int, default=1024, help="rows of each stream to keep")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = Llama3Tokenizer(args.tokenizer)
    rows = [json.loads(line) for line in args.responses.read_text().splitlines()]
    trained, held_out = rows[: -args.held_out], rows[-args.held_out :]
    everything, rehearsed = (stream_of(part, tokenizer, args.seed) for part in (trained, trained[: args.rehearsed]))
    counts = everything.bincount(minlength=tokenizer.size)
    print(f"{len(everything)} tokens, {int((counts > 0).sum())} of {tokenizer.size} words", flush=True)
    frequent = counts.float() ** 0.75
    proposal = 0.7 * frequent / frequent.sum() + 0.3 / tokenizer.size
    model = Model(counts, args.hidden)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, stream, source, until in (
        ("states", everything, held_out, 0.0),
        ("states-of-rehearsed-text", rehearsed, trained, args.until),
    ):
        train(model, stream, proposal, until, args)
        found, head = states(model, source, tokenizer, args.rows), model.head.weight.detach()
        print(f"{name}: {json.dumps(describe(found, head, counts == 0), indent=1)}", flush=True)
        tensors = {
            "target": found.target.bfloat16(), "draft": found.draft.bfloat16(), "labels": found.labels,
            "weight": head.bfloat16(),
        }  # fmt: skip
        save_file(tensors, args.out / f"{name}.safetensors")


if __name__ == "__main__":
    main()
