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
from engine.options import DEFAULT_CONDITION, RefineOptions
from engine.refiner import Refiner
from engine.request import Request, Result
from engine.session import Session

logging.getLogger("engine").addHandler(logging.NullHandler())

__all__ = [
    "DEFAULT_CONDITION",
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
    "Session",
    "UnsupportedModel",
]
