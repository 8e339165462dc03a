"""Train the base of the refiners here: a language model that copies a draft answer and corrects it.

The model sees chat turns in two forms and is trained on the assistant's answer (with its end of turn) only:

- unconditional: user = prompt, assistant = best response;
- conditioned: user = CONDITION filled with prompt and draft, assistant = best response, the draft being the
  response with a few words artificially damaged, so that the answer is mostly a copy of the draft.

Conditioned examples are mostly short chunks. They are taken from all responses of a prompt, not only the best one:
copying needs more variety of text than the best responses have. Early training adds lists of random words to
repeat. Answers grow from a few words to 256 tokens, and later rows join several turns into one conversation. Training
starts from weights that can copy (see induction.py); a second run with --init goes on from a checkpoint, with --plain also
on whole responses without a draft.

The last HELD_OUT prompts of the data file are never trained on, by the tokenizer neither. With --steps a run is
deterministic for its seed; with --minutes the schedule follows the clock instead.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.reproduction.data import HELD_OUT
from bench.reproduction.examples import ASSISTANT, END, PAD, USER, Example, ExampleMaker, Row, load_rows
from bench.reproduction.induction import write_induction

POSITIONS = 2048
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
Batch = tuple[torch.Tensor, torch.Tensor]


def build_tokenizer(rows: list[Row], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the rows' text and give it the chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True, normalized=False) for name in (USER, ASSISTANT, END, PAD)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((text for row in rows for text in (row.prompt, row.best, *row.others)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh Llama model of the sizes in ``args``."""
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // args.head_dim,
        num_key_value_heads=args.hidden // args.head_dim,
        head_dim=args.head_dim,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    write_induction(model, *tokenizer.convert_tokens_to_ids([USER, ASSISTANT]))
    return model


def draw(maker: ExampleMaker, progress: float, plain: float) -> Example:
    """Draw one example of the curriculum at ``progress`` (0 at the start, 1 at the end).

    A share ``plain`` are whole responses without a draft: of all responses, not only the best.
    """
    rng = maker.rng
    if rng.random() < plain:
        return maker.full_example(max_tokens=256, conditioned=False, best=False)
    kind = rng.random()
    longest = 30 if progress < 0.05 else 80
    if kind < 0.05 + max(0.0, 0.2 - 2 * progress):
        return maker.copy_example(max_words=longest, few=rng.random() < 0.6)
    if kind > 0.94:
        return maker.full_example(max_tokens=160, conditioned=False)
    if kind > 0.86:
        return maker.full_example(max_tokens=rng.choice((128, 256)), conditioned=True)
    turns = [maker.chunk_example(max_words=longest)]
    if progress > 0.5 and rng.random() < 0.15:
        turns += [maker.chunk_example(max_words=longest) for _ in range(rng.randint(1, 3))]
    return [i for ids, _ in turns for i in ids], [w for _, weights in turns for w in weights]


def collate(examples: list[Example], pad: int) -> Batch:
    """Right-pad examples: attention is causal, so padding needs no mask, only to be left out of the loss."""
    width = max(len(ids) for ids, _ in examples)
    ids = torch.full((len(examples), width), pad)
    weights = torch.zeros((len(examples), width))
    for i, (row, weight) in enumerate(examples):
        ids[i, : len(row)] = torch.tensor(row)
        weights[i, : len(weight)] = torch.tensor(weight)
    return ids, weights


def batches(examples: list[Example], tokens: int, pad: int) -> Iterator[Batch]:
    """Group examples of similar length into batches of at most ``tokens`` padded tokens."""
    group: list[Example] = []
    for example in sorted(examples, key=lambda e: len(e[0])):
        if group and len(example[0]) * (len(group) + 1) > tokens:
            yield collate(group, pad)
            group = []
        group.append(example)
    if group:
        yield collate(group, pad)


def forward(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and correct guesses of the answer tokens; logits are computed for these tokens alone."""
    ids, weights = batch
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    answer = weights[:, 1:] > 0
    logits, labels, weight = model.lm_head(hidden[:, :-1][answer]), ids[:, 1:][answer], weights[:, 1:][answer]
    loss = (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / weight.sum()
    return loss, logits.argmax(-1) == labels


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, groups: list[Batch]) -> float:
    """Teacher-forced share of right answer tokens."""
    hits = torch.cat([forward(model, batch)[1] for batch in groups])
    return hits.float().mean().item()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint with half-precision weights."""
    half = LlamaForCausalLM(model.config).to(torch.float16)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)


@torch.no_grad()
def average(model: LlamaForCausalLM, first: LlamaForCausalLM, share: float) -> None:
    """Mix the weights of ``model`` with those of ``first``: it makes a short second stage copy more steadily."""
    for weight, old in zip(model.parameters(), first.parameters(), strict=True):
        weight.lerp_(old, 1 - share)


def evaluation_sets(maker: ExampleMaker, pad: int) -> dict[str, list[Batch]]:
    """Fixed held-out batches: random words (many, few) to copy, damaged chunks, damaged longer responses."""
    drawn = {
        "copy": [maker.copy_example(20) for _ in range(12)],
        "maze": [maker.copy_example(60, few=True) for _ in range(10)],
        "chunk": [maker.chunk_example(40) for _ in range(40)],
        "full": [maker.full_example(200, conditioned=True) for _ in range(6)],
        "plain": [maker.full_example(128, conditioned=False) for _ in range(10)],
    }
    return {name: list(batches(examples, 4096, pad)) for name, examples in drawn.items()}


def optimizer_for(model: LlamaForCausalLM, lr: float) -> torch.optim.Optimizer:
    """AdamW, without weight decay on vectors, and slow on embeddings.

    The softmax gives every embedding a gradient in every step, however small, and Adam would make full steps of it.
    """
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim > 1 and p is not embedding]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.05, "peak": lr},
        {"params": vectors, "weight_decay": 0.0, "peak": lr},
        {"params": [embedding], "weight_decay": 0.0, "peak": 0.3 * lr},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def scores(model: LlamaForCausalLM, held_out: dict[str, list[Batch]]) -> dict[str, float]:
    """Teacher-forced accuracy on each held-out set."""
    return {name: round(accuracy(model, groups), 4) for name, groups in held_out.items()}


class Budget:
    """How far a run is, from 0 to 1, by steps or by the clock."""

    def __init__(self, steps: int | None, minutes: float | None) -> None:
        self.steps, self.seconds = steps, (minutes or 0) * 60
        self.start = time.monotonic()
        self.done = 0

    def progress(self) -> float:
        """Share of the budget used up."""
        return self.done / self.steps if self.steps else (time.monotonic() - self.start) / self.seconds


def stream(maker: ExampleMaker, budget: Budget, tokens: int, pad: int, first: float, plain: float) -> Iterator[Batch]:
    """Draw batches, from short to long answers, until the budget is used up."""
    while True:
        progress = first + (1 - first) * budget.progress()
        pool = list(batches([draw(maker, progress, plain) for _ in range(400)], tokens, pad))
        maker.rng.shuffle(pool)
        for batch in pool:
            if budget.progress() >= 1.0:
                return
            yield batch


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, rate: float) -> float:
    """One optimizer step at ``rate`` times the peak learning rates; returns the loss."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    loss, _ = forward(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(args: argparse.Namespace) -> None:
    """Run the training that ``args`` describes."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rows = load_rows(args.data)
    tokenizer = build_tokenizer(rows[:-HELD_OUT], args.vocab)
    core, pad = tokenizer.backend_tokenizer, tokenizer.pad_token_id
    maker = ExampleMaker(rows[:-HELD_OUT], core, random.Random(args.seed))
    held_out = evaluation_sets(ExampleMaker(rows[-HELD_OUT:], core, random.Random(1)), pad)
    model = (
        LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32) if args.init else build_model(args, tokenizer)
    )
    optimizer = optimizer_for(model, args.lr)
    print(f"{model.num_parameters() / 1e6:.2f}M parameters, {len(rows) - HELD_OUT} training prompts", flush=True)
    budget = Budget(args.steps, args.minutes)
    logged = saved = budget.start
    seen = 0
    for batch in stream(maker, budget, args.tokens, pad, first=0.5 if args.init else 0.0, plain=args.plain):
        rate = min(1.0, (budget.done + 1) / args.warmup) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * budget.progress()))
        loss = train_step(model, optimizer, batch, rate)
        budget.done, seen = budget.done + 1, seen + batch[0].numel()
        now = time.monotonic()
        if now - logged > args.log_seconds:
            logged = now
            line = {"s": int(now - budget.start), "step": budget.done, "ktok": seen // 1000, "loss": round(loss, 3)}
            print(json.dumps(line | scores(model, held_out)), flush=True)
        if now - saved > args.save_seconds:
            saved = now
            save(model, tokenizer, args.out)
    if args.init:
        average(model, LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32), args.mix)
    save(model, tokenizer, args.out)
    print(json.dumps({"done": budget.done, "ktok": seen // 1000, **scores(model, held_out)}), flush=True)


def parse_args() -> argparse.Namespace:
    """Command line of the training script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="JSON lines: prompt, responses with text and reward")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--init", type=Path, help="checkpoint of a first stage; goes on without its short, easy start")
    parser.add_argument("--mix", type=float, default=1.0, help="share of the new weights in the result, with --init")
    parser.add_argument("--plain", type=float, default=0.0, help="share of whole responses without a draft")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="time budget")
    budget.add_argument("--steps", type=int, help="number of optimizer steps (deterministic)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear learning-rate warm-up")
    parser.add_argument("--tokens", type=int, default=2048, help="padded tokens of a batch")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=320)
    parser.add_argument("--intermediate", type=int, default=640)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--log-seconds", type=float, default=180)
    parser.add_argument("--save-seconds", type=float, default=300)
    return parser.parse_args()


if __name__ == "__main__":
    train(parse_args())
