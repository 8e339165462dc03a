"""Loops that train as train_step does, written anew in plain PyTorch: what ``bench.bench_train_step`` compares it with.

All of them leave the same gradients of the same loss: the mean cross entropy of the targets' tokens plus OMEGA times the
mean divergence of the draft positions. Logits have the model's dtype, losses are computed in float32.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from engine.training import TrainBatch
from engine.training.backbone import CausalLM
from engine.training.step import hidden_rows

OMEGA, PAD, EOS = 1e3, 0, 2
Chosen = tuple[list[int], list[int], list[list[int]]]
"""Prompt, target, drafts."""


def filled(draft: list[int], length: int) -> list[int]:
    """The draft as long as the target."""
    return (draft + [PAD] * length)[:length]


def first_pair(target: list[int], draft: list[int]) -> int:
    """The first index of the response at which the contexts differ."""
    return next((i + 1 for i, (a, b) in enumerate(zip(target, draft, strict=True)) if a != b), len(target))


def counts(chosen: list[Chosen]) -> tuple[int, int]:
    """Tokens with a cross entropy, positions with a divergence."""
    pairs = sum(len(t) - first_pair(t, filled(d, len(t))) for _, t, drafts in chosen for d in drafts)
    return sum(len(target) for _, target, _ in chosen), max(1, pairs)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Sum of KL(teacher || student) over rows of logits."""
    log_p, log_q = teacher.detach().float().log_softmax(-1), student.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def consistency_llm(model: PreTrainedModel, chosen: list[Chosen]) -> float:
    """One trajectory after the other: a forward and backward of the target for its cross entropy, a forward of the target
    without gradients as the teacher, a forward and backward of every draft; logits of all tokens. Returns the loss."""
    labels, pairs = counts(chosen)
    total = torch.zeros((), device=model.device)
    for prompt, target, drafts in chosen:
        rows = slice(len(prompt) - 1, -1)
        ids = torch.tensor([prompt + target], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, rows]
        loss = F.cross_entropy(logits.float(), ids[0, len(prompt) :], reduction="sum") / labels
        loss.backward()
        total += loss.detach()
        with torch.no_grad():
            teacher = model(input_ids=ids, use_cache=False).logits[0, rows]
        for draft in drafts:
            guess = filled(draft, len(target))
            first = first_pair(target, guess)
            given = torch.tensor([prompt + guess], device=model.device)
            student = model(input_ids=given, use_cache=False).logits[0, rows]
            loss = OMEGA * divergence(teacher[first:], student[first:]) / pairs
            loss.backward()
            total += loss.detach()
    return float(total)


def one_by_one(model: PreTrainedModel, chosen: list[Chosen]) -> float:
    """One trajectory after the other without waste: target and drafts, equally long, as the rows of one forward and
    backward, the target's logits for both terms, no logits of the prompt. Returns the loss."""
    labels, pairs = counts(chosen)
    total = 0.0
    for prompt, target, drafts in chosen:
        texts = [prompt + response for response in (target, *(filled(d, len(target)) for d in drafts))]
        hidden = model.model(input_ids=torch.tensor(texts, device=model.device), use_cache=False).last_hidden_state
        loss = _loss(model, chosen=[(prompt, target, drafts)], hidden=iter(hidden), labels=labels, pairs=pairs)
        loss.backward()
        total += float(loss.detach())
    return total


def padded(model: PreTrainedModel, chosen: list[Chosen]) -> float:
    """The same for all trajectories at once, as the rows of one right-padded batch. Returns the loss."""
    labels, pairs = counts(chosen)
    texts = [p + r for p, t, drafts in chosen for r in (t, *(filled(d, len(t)) for d in drafts))]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [PAD] * (longest - len(text)) for text in texts], device=model.device)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # padding lies behind all that counts
    loss = _loss(model, chosen=chosen, hidden=iter(hidden), labels=labels, pairs=pairs)
    loss.backward()
    return float(loss.detach())


def _loss(model: PreTrainedModel, *, chosen: list[Chosen], hidden: Iterator[Tensor], labels: int, pairs: int) -> Tensor:
    """Of hidden states [tokens, D], one tensor after the other for every target and its drafts."""
    loss = torch.zeros((), device=model.device)
    for prompt, target, drafts in chosen:
        rows = slice(len(prompt) - 1, len(prompt) + len(target) - 1)
        teacher = model.lm_head(next(hidden)[rows])
        right = torch.tensor(target, device=model.device)
        loss = loss + F.cross_entropy(teacher.float(), right, reduction="sum") / labels
        for draft in drafts:
            first = first_pair(target, filled(draft, len(target)))
            student = model.lm_head(next(hidden)[rows][first:])
            loss = loss + OMEGA * divergence(teacher[first:], student) / pairs
    return loss


def shared_prompt(model: PreTrainedModel, batch: TrainBatch) -> float:
    """train_step's own rows, in which the prompt is computed once, with the loss in plain PyTorch. Returns the loss."""
    hidden = hidden_rows(CausalLM.of(model), batch)
    teacher = model.lm_head(hidden[batch["target_rows"]])
    student = model.lm_head(hidden[batch["draft_rows"]])
    loss = F.cross_entropy(teacher.float(), batch["labels"])
    loss = loss + OMEGA * divergence(teacher[batch["pair_index"]], student) / batch["pair_count"].clamp_min(1)
    loss.backward()
    return float(loss.detach())
