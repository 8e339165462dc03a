"""Typed errors. Each message says what was got, what was expected and what to do."""

import sys


class EngineError(Exception):
    """Base of everything this package raises on purpose."""


class InvalidRequest(EngineError):
    """One request cannot be served as it is; the others are unaffected."""


class RequestTooLong(InvalidRequest):
    """Prompt and answer do not fit the model's positions or the KV pool."""


class NonFiniteLogits(EngineError):
    """The model produced only NaN for a position; that request ends, the others go on."""


class OutOfMemory(EngineError):
    """A forward pass for this request alone did not fit into memory; the others go on."""


class UnsupportedModel(EngineError):
    """A checkpoint needs something the engine does not implement; raised when it is loaded."""


class InvalidTrajectory(EngineError):
    """A trajectory cannot be trained on as it is; leave it out or mend it."""


class TrainingDiverged(EngineError):
    """The loss or its gradient is not finite, or the loss exploded; that step was not taken."""


class QueueFull(EngineError):
    """The request was not taken, as too many wait already; nothing was begun for it."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, retry_after)

    def __str__(self) -> str:
        return str(self.args[0])

    @property
    def retry_after(self) -> float:
        """Seconds after which it is worth asking again, at the rate at which requests are served at the moment."""
        return float(self.args[1])


class DeadlineExceeded(EngineError):
    """The answer was not ready at the request's deadline; what had been computed of it is dropped."""


class EngineDead(EngineError):
    """The refiner was closed, or failed in a way that is no single request's."""


def failures() -> tuple[type[Exception], ...]:
    """What a step can fail with that is no bug of this package. Triton's errors (shared memory that is not there, ptxas) derive
    from a base of its own; where nobody has imported Triton none of them can have been raised."""
    triton = getattr(sys.modules.get("triton"), "TritonError", None)
    return (RuntimeError, MemoryError) if triton is None else (RuntimeError, MemoryError, triton)
