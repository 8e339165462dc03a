"""The consistency loss, forward and backward, and whole training steps."""

import functools
from typing import Any

import torch
from torch import Tensor

from bench.bench_train_step import build, calls, draw
from bench.consistency_variants import Loss, eager, inputs, ours
from bench.consistency_variants import Shape as LossShape
from bench.suite.case import Case, Operation, Shape


def of_loss(shape: Shape, dtype: torch.dtype) -> Case:
    """Rows of each stream, hidden size, vocabulary; gradients of both streams and the head."""
    leaves, labels = inputs(LossShape(*shape, dtype))

    def gradients(loss: Loss) -> tuple[Tensor, ...]:
        value = loss(*leaves, labels, None)
        return value.detach(), *torch.autograd.grad(value, leaves)

    compiled = functools.cache(
        lambda: torch.compile(eager)
    )  # making it takes seconds, which a quick run has no use for
    found = {
        "engine": lambda: gradients(ours),
        "eager": lambda: gradients(eager),
        "compile": lambda: gradients(compiled()),
    }
    if dtype is not torch.float32:  # eager's own gradients of the drafts are percents off
        return Case(found, tolerance=0.05)
    return Case(found)


def of_step(shape: Shape, dtype: torch.dtype) -> Case:
    """Trajectories, drafts of each; a model of the shipped refiner's shape."""
    trajectories, drafts = shape
    model = build("tiny", "sdpa", "cpu", dtype)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    steps: dict[str, Any] = calls(model, draw(trajectories, drafts, model.config.vocab_size), "auto", None)
    names = {"engine": "train_step, one by one", "consistency-llm": "consistency-llm", "one by one": "one by one"}

    def step(name: str) -> tuple[Tensor, Tensor]:
        loss = torch.tensor(steps[names[name]]())
        return loss, torch.stack([parameter.grad.float().norm() for parameter in model.parameters()])  # type: ignore[union-attr]

    return Case({name: lambda name=name: step(name) for name in names}, tolerance(dtype))  # type: ignore[misc]


def tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype is torch.float32 else 0.05


OPERATIONS = {
    "consistency_loss": Operation(
        of_loss, ("engine", "eager"),
        {"tiny": ((8, 48, 640),), "quick": ((64, 576, 16384),), "full": ((512, 1024, 32000),)},
        ("float32", "bfloat16"), only_full=("compile",),
    ),
    "train_step": Operation(
        of_step, ("engine", "consistency-llm", "one by one"), {"tiny": ((1, 1),), "quick": ((2, 1),), "full": ((2, 3),)}
    ),
}  # fmt: skip
