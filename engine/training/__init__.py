"""Training of a refiner: the layout of a trajectory in a row, its collator, attention masks and the loss of a batch.

These names depend on ``engine.kernels`` and on the user's own transformers model; the rest of the engine is not involved. The
modules of ``python -m engine.train`` (settings, data, checkpoints, trainer) lie beside them and use more; import them by name.
"""

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
