"""The normalisations of a decoder layer."""

from engine.kernels.gpu import rms_norm
from tests.kernels.ahead_of_time.compiling import Launch, distinct, meta, recording
from tests.kernels.ahead_of_time.models import MODELS

MODULES = (rms_norm,)
SHAPES = MODELS


def multiplies(kernel: str, shape: str) -> bool:
    return False


def launches(shape: str) -> list[Launch]:
    model = MODELS[shape]
    with recording(*MODULES) as found:
        for residual in (None, meta(64, model.d, dtype=model.dtype)):
            rms_norm.rms_norm(meta(64, model.d, dtype=model.dtype), meta(model.d), 1e-6, residual)
    return distinct(found)
