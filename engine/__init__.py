"""DiffPO refinement engine: a small language model corrects whole draft answers in parallel Jacobi steps.

Importing this package loads no model, starts no thread and opens no file; PyTorch and transformers are imported with the
first name that needs them.
"""

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.async_refiner import AsyncRefiner
    from engine.errors import (
        DeadlineExceeded,
        EngineDead,
        EngineError,
        InvalidRequest,
        InvalidTrajectory,
        NonFiniteLogits,
        OutOfMemory,
        QueueFull,
        RequestTooLong,
        TrainingDiverged,
        UnsupportedModel,
    )
    from engine.kernels import ConsistencyLoss, ConsistencyLossOutput, consistency_loss
    from engine.options import DEFAULT_CONDITION, RefineOptions
    from engine.refiner import Refiner
    from engine.request import Request, Result
    from engine.service.metrics import Metrics
    from engine.service.ticket import Iterate
    from engine.session import Session
    from engine.training import TrainStepOutput, Trajectory, TrajectoryCollator, train_step

logging.getLogger("engine").addHandler(logging.NullHandler())

__all__ = [
    "DEFAULT_CONDITION",
    "AsyncRefiner",
    "ConsistencyLoss",
    "ConsistencyLossOutput",
    "DeadlineExceeded",
    "EngineDead",
    "EngineError",
    "InvalidRequest",
    "InvalidTrajectory",
    "Iterate",
    "Metrics",
    "NonFiniteLogits",
    "OutOfMemory",
    "QueueFull",
    "RefineOptions",
    "Refiner",
    "Request",
    "RequestTooLong",
    "Result",
    "Session",
    "TrainStepOutput",
    "TrainingDiverged",
    "Trajectory",
    "TrajectoryCollator",
    "UnsupportedModel",
    "consistency_loss",
    "train_step",
]

_HOMES = {
    "AsyncRefiner": "async_refiner",
    "Iterate": "service.ticket",
    "Metrics": "service.metrics",
    "ConsistencyLoss": "kernels",
    "ConsistencyLossOutput": "kernels",
    "consistency_loss": "kernels",
    "DEFAULT_CONDITION": "options",
    "RefineOptions": "options",
    "Refiner": "refiner",
    "Request": "request",
    "Result": "request",
    "Session": "session",
    "TrainStepOutput": "training",
    "Trajectory": "training",
    "TrajectoryCollator": "training",
    "train_step": "training",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
