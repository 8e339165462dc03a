"""Training of a refiner: the layout of a trajectory in a row, its collator, attention masks and the loss of a batch.

These names depend on ``engine.kernels`` and on the user's own transformers model; the rest of the engine is not involved.
They come with their first use, so that the settings and their help need no PyTorch. The modules of ``python -m
engine.train`` (settings, data, checkpoints, trainer) lie beside them and use more; import them by name.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.training.collator import TrainBatch, TrajectoryCollator, collate
    from engine.training.layout import Layout, Trajectory, lay_out, rank
    from engine.training.masks import attention_masks, visible
    from engine.training.step import TrainStepOutput, train_step
    from engine.training.verify import verify_model

__all__ = [
    "Layout",
    "TrainBatch",
    "TrainStepOutput",
    "Trajectory",
    "TrajectoryCollator",
    "attention_masks",
    "collate",
    "lay_out",
    "rank",
    "train_step",
    "verify_model",
    "visible",
]

_HOMES = {
    "Layout": "layout",
    "TrainBatch": "collator",
    "TrainStepOutput": "step",
    "Trajectory": "layout",
    "TrajectoryCollator": "collator",
    "attention_masks": "masks",
    "collate": "collator",
    "lay_out": "layout",
    "rank": "layout",
    "train_step": "step",
    "verify_model": "verify",
    "visible": "masks",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
