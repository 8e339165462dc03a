"""Drafts refined by the model in training, to be read beside its losses."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from engine.jacobi import Vocabulary
from engine.training.backbone import CausalLM
from engine.training.collator import TrainBatch, collate
from engine.training.layout import Trajectory, lay_out
from engine.training.step import hidden_rows

STEPS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Refined:
    """One draft after some of the Jacobi steps; ids without what follows the end of the turn."""

    trajectory: Trajectory
    after: dict[int, list[int]]
    """By number of steps."""
    changed: dict[int, int]
    """Positions that the last of these steps still changed."""


@torch.no_grad()
def refine_samples(
    model: nn.Module, trajectories: Sequence[Trajectory], vocabulary: Vocabulary, *, window: int
) -> list[Refined]:
    """The worst response of each trajectory after plain Jacobi steps over a window (METHOD of arXiv 2503.04240: every
    position becomes argmax p(. | x, y[< i]) of the iterate before). Whole forward passes without a cache: any model that
    can be trained can do it, wrapped or sharded as it is, and it is its own check on the engine."""
    causal_lm = CausalLM.of(model)
    device = causal_lm.model.get_input_embeddings().weight.device
    iterates = [_fill(trajectory.responses[0], window, vocabulary.pad) for trajectory in trajectories]
    after: list[dict[int, list[int]]] = [{} for _ in trajectories]
    changed: list[dict[int, int]] = [{} for _ in trajectories]
    for step in range(1, max(STEPS) + 1):
        before, iterates = iterates, _next(model, causal_lm, trajectories, iterates, vocabulary.pad, device)
        if step in STEPS:
            for index, (old, new) in enumerate(zip(before, iterates, strict=True)):
                after[index][step] = _until_end(new, vocabulary)
                changed[index][step] = sum(a != b for a, b in zip(old, new, strict=True))
    return [Refined(*made) for made in zip(trajectories, after, changed, strict=True)]


def write_samples(path: Path, refined: Sequence[Refined], tokenizer: PreTrainedTokenizerBase, *, step: int) -> None:
    """Appends a JSON line for each; those that an interrupted run has written for later steps go first."""
    kept = [line for line in _lines(path) if json.loads(line)["step"] < step]
    lines = [json.dumps(_row(sample, tokenizer, step), ensure_ascii=False) for sample in refined]
    temporary = path.with_name(f".partial-{path.name}")
    temporary.write_text("".join(line + "\n" for line in [*kept, *lines]), encoding="utf-8")
    temporary.replace(path)


def _next(
    model: nn.Module, causal_lm: CausalLM, trajectories: Sequence[Trajectory], iterates: list[list[int]], pad: int,
    device: torch.device,
) -> list[list[int]]:  # fmt: skip
    rows = [
        [lay_out(trajectory.prompt_ids, iterate, [], pad_id=pad, window=len(iterate))]
        for trajectory, iterate in zip(trajectories, iterates, strict=True)
    ]
    batch = collate(rows, pad)
    on_device: Any = {name: tensor.to(device) for name, tensor in batch.items()}  # type: ignore[attr-defined]
    (predicted,) = causal_lm.call_inside(model, lambda: (_predict(causal_lm, on_device),))
    return [part.tolist() for part in predicted.split([len(iterate) for iterate in iterates])]


def _predict(causal_lm: CausalLM, batch: TrainBatch) -> Tensor:
    head = causal_lm.head()  # its soft-cap is monotonic: the argmax does without
    hidden = hidden_rows(causal_lm, batch)[batch["target_rows"]]
    bias = None if head.bias is None else head.bias.to(hidden.dtype)
    return nn.functional.linear(hidden, head.weight.to(hidden.dtype), bias).argmax(-1)


def _fill(draft: Sequence[int], window: int, pad: int) -> list[int]:
    return [*draft[:window], *[pad] * (window - len(draft))]


def _until_end(ids: list[int], vocabulary: Vocabulary) -> list[int]:
    end = next((index for index, token in enumerate(ids) if token in vocabulary.eos), len(ids))
    return ids[:end]


def _row(sample: Refined, tokenizer: PreTrainedTokenizerBase, step: int) -> dict[str, Any]:
    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    trajectory = sample.trajectory
    return {
        "step": step,
        "id": trajectory.id,
        "prompt": text(trajectory.prompt_ids),
        "draft": text(trajectory.responses[0]),
        "best": text(trajectory.responses[-1]),
        "after": {str(steps): text(ids) for steps, ids in sample.after.items()},
        "changed": {str(steps): count for steps, count in sample.changed.items()},
    }


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
