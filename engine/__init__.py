"""DiffPO refinement engine: a small language model corrects whole draft answers in parallel Jacobi steps.

Importing this package loads no model, starts no thread and opens no file.
"""

import logging

from engine.errors import (
    EngineDead,
    EngineError,
    InvalidRequest,
    NonFiniteLogits,
    OutOfMemory,
    RequestTooLong,
    UnsupportedModel,
)
from engine.kernels import ConsistencyLoss, ConsistencyLossOutput, consistency_loss
from engine.options import DEFAULT_CONDITION, RefineOptions
from engine.refiner import Refiner
from engine.request import Request, Result

logging.getLogger("engine").addHandler(logging.NullHandler())

__all__ = [
    "DEFAULT_CONDITION",
    "ConsistencyLoss",
    "ConsistencyLossOutput",
    "EngineDead",
    "EngineError",
    "InvalidRequest",
    "NonFiniteLogits",
    "OutOfMemory",
    "RefineOptions",
    "Refiner",
    "Request",
    "RequestTooLong",
    "Result",
    "UnsupportedModel",
    "consistency_loss",
]
