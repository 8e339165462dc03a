"""The training loss by its definition: a plain forward of prompt and response each, contexts compared token by token."""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from engine.training import Trajectory, TrajectoryCollator, rank, train_step
from tests.engine.checkpoints import PAD, VOCABULARY

EOS = 2
EPSILON = torch.finfo(torch.float32).eps
Chosen = tuple[list[int], list[int], list[list[int]]]
"""Prompt, target, drafts."""


@dataclass(frozen=True)
class Results:
    loss: Tensor
    ar: Tensor
    consistency: Tensor
    gradients: dict[str, Tensor]
    label_count: int
    pair_count: int


def naive_pairs(target: Sequence[int], draft: Sequence[int]) -> list[int]:
    """Indices of the response whose contexts differ, by comparing the contexts themselves."""
    return [i for i in range(len(target)) if list(target[:i]) != list(draft[:i])]


def fitted(draft: Sequence[int], length: int, pad: int = PAD) -> list[int]:
    """The draft as long as the target."""
    return (list(draft) + [pad] * length)[:length]


def plain_loss(
    model: PreTrainedModel, chosen: Sequence[Chosen], *, omega: float = 1e3, window: int = 256, vocabulary_mean: bool = False,
) -> Results:  # fmt: skip
    """Loss and all gradients, in the model's dtype, through the model's own forward and logits."""
    entropies, divergences = [], []
    for prompt, target, drafts in chosen:
        target = target[:window]
        teacher = _predictions(model, prompt, target)
        entropies.append(F.cross_entropy(teacher, torch.tensor(target), reduction="none"))
        for draft in drafts:
            filled = fitted(draft, len(target))
            if pairs := naive_pairs(target, filled):
                student = _predictions(model, prompt, filled)
                log_p, log_q = teacher[pairs].detach().log_softmax(-1), student[pairs].log_softmax(-1)
                divergence = log_p.exp() * (log_p - log_q)
                divergences.append(divergence.mean(-1) if vocabulary_mean else divergence.sum(-1))
    ar = torch.cat(entropies).mean()
    consistency = torch.cat(divergences).mean() if divergences else torch.zeros_like(ar)
    loss = ar + omega * consistency
    return Results(
        loss.detach(), ar.detach(), consistency.detach(), gradients(model, loss), sum(map(len, entropies)),
        sum(map(len, divergences)),
    )  # fmt: skip


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter that is trained."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def step(model: torch.nn.Module, collator: TrajectoryCollator, given: Sequence[Trajectory], **options: Any) -> Results:
    """The same by ``train_step``."""
    out = train_step(model, collator(given), loss_impl="torch", **options)
    grads = gradients(model, out.loss)
    return Results(out.loss.detach(), out.ar, out.consistency, grads, int(out.label_count), int(out.pair_count))


def double(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in float64; the norms of transformers still round to float32 inside."""
    return copy.deepcopy(model).double()


def assert_close(actual: Results, exact: Results, plain: Results, slack: float = 3.0) -> None:
    """``actual`` is no further from the float64 result than the plain float32 one is, times ``slack`` and roundings."""
    assert (actual.label_count, actual.pair_count) == (exact.label_count, exact.pair_count)
    assert actual.gradients.keys() == exact.gradients.keys()
    total = max(float(g.double().norm()) for g in exact.gradients.values())
    for name, e in exact.gradients.items():
        error, floor = distance(actual.gradients[name], e), distance(plain.gradients[name], e)
        allowed = slack * floor + 8 * EPSILON * (float(e.norm()) + 0.01 * total)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}, norm {float(e.norm()):.3g}"
    for name in ("ar", "consistency", "loss"):
        a, e, p = (getattr(results, name) for results in (actual, exact, plain))
        allowed = slack * distance(p, e) + 32 * EPSILON * max(1.0, float(e.abs()))
        assert distance(a, e) <= allowed, (name, float(a), float(e), allowed)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm())


def trajectories(seed: int, count: int = 3, responses: int = 4, longest: int = 22) -> list[Trajectory]:
    """Random ones, whose responses are damaged copies of the best: tokens replaced, left out, added, cut off."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        prompt = [rng.randrange(4, VOCABULARY) for _ in range([1, 9, 24, 5][index % 4])]
        target = [rng.randrange(4, VOCABULARY) for _ in range(rng.randrange(6, longest))]
        others = [_damaged(rng, target) for _ in range(responses - 1)]
        made.append(Trajectory(id=f"t{index}", prompt_ids=prompt, responses=[*others, [*target, EOS]]))
    return made


def chosen_by(collator: TrajectoryCollator, given: Sequence[Trajectory]) -> list[Chosen]:
    """What the collator draws, for the plain loss."""
    chosen: list[Chosen] = []
    for trajectory in given:
        *others, target = rank(trajectory, collator.eos_ids)
        drawn = collator.draw(trajectory.id, len(others))
        chosen.append((list(trajectory.prompt_ids), target, [others[index] for index in drawn]))
    return chosen


def _damaged(rng: random.Random, target: list[int]) -> list[int]:
    text = list(target)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(text))
        text[place : place + rng.randrange(2)] = [rng.randrange(4, VOCABULARY)] * rng.randrange(3)
        text = text or [5]
    text = text[: rng.randrange(2, len(text) + 6)]
    return [*text, EOS] if rng.random() < 0.7 else text


def _predictions(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """[response, vocabulary] logits that predict each of its tokens."""
    logits: Tensor = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1]
