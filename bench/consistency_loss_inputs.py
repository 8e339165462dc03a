"""Batches for the consistency loss on a GPU, random or of a trained model, and what a trainer would write for it."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from engine.kernels.consistency_loss.problem import Problem

OMEGA = 1e3


@dataclass(frozen=True)
class Inputs:
    """One batch: every target row has a label and teaches one draft row."""

    target: Tensor
    draft: Tensor
    weight: Tensor
    labels: Tensor
    pairs: Tensor
    softcap: float | None

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.target, self.draft, self.weight

    def first(self, rows: int) -> "Inputs":
        """A batch of its own of the first rows of both streams."""
        hidden = [x.detach()[:rows].clone().requires_grad_() for x in (self.target, self.draft)]
        return Inputs(hidden[0], hidden[1], self.weight, self.labels[:rows], self.pairs[:rows], self.softcap)

    def problem(self, filter_eps: float) -> Problem:
        """As the loss's own input, for the sparse plan."""
        rows = self.labels.numel()
        scale = torch.full((rows,), 1 / max(1, rows), dtype=torch.float32, device=self.labels.device)
        target, draft, weight = (x.detach() for x in self.leaves())
        return Problem(
            target, draft, weight, None, self.labels, self.pairs, scale, OMEGA * scale, self.softcap, 1.0, filter_eps, "sparse"
        )  # fmt: skip


def make(rows: int, v: int, d: int, softcap: float | None, device: str, distance: float = 0.3) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator, dtype=torch.float32)

    target = normal(rows, d)
    draft = target + distance * normal(rows, d)
    weight = torch.empty(v, d, device=device, dtype=torch.bfloat16)
    for part in weight.split(16384):
        part.copy_(normal(*part.shape) * 2 / d**0.5)
    hidden = [x.bfloat16().requires_grad_() for x in (target, draft)]
    labels = torch.randint(v, (rows,), device=device, generator=generator)
    return Inputs(hidden[0], hidden[1], weight.requires_grad_(), labels, torch.arange(rows, device=device), softcap)


def load(path: Path, rows: int, device: str) -> Inputs:
    """At most ``rows`` rows of a safetensors file with target and draft [n, d], weight [v, d] and labels [n]."""
    tensors = load_file(path, device=device)
    if missing := {"target", "draft", "weight", "labels"} - tensors.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(tensors))}")
    target, draft = (tensors[name][:rows].bfloat16().requires_grad_() for name in ("target", "draft"))
    labels = tensors["labels"][:rows].long()
    weight = tensors["weight"].bfloat16().requires_grad_()
    return Inputs(target, draft, weight, labels, torch.arange(labels.numel(), device=device), None)


def capped(z: Tensor, cap: float | None) -> Tensor:
    return cap * torch.tanh(z / cap) if cap else z


def plain_loss(
    target: Tensor, draft: Tensor, weight: Tensor, labels: Tensor, pairs: Tensor, softcap: float | None
) -> Tensor:
    """What a trainer writes: logits in the model's dtype, cast to float32 (float64 with float64 inputs) for the loss."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    teacher, student = (capped(F.linear(x, weight), softcap).to(wide) for x in (target, draft))
    ce = F.cross_entropy(teacher, labels)
    log_p = teacher.detach().log_softmax(-1)[pairs]
    return ce + OMEGA * F.kl_div(student.log_softmax(-1), log_p, reduction="batchmean", log_target=True)
