"""Both activations, of so many rows that programs are large, and of one."""

from engine.kernels.gpu import gated_activation
from tests.kernels.ahead_of_time.compiling import Launch, meta, recording
from tests.kernels.ahead_of_time.models import MODELS

MODULES = (gated_activation,)
SHAPES = {f"{name}, {rows} rows": (model, rows) for name, model in MODELS.items() for rows in (1, 2048)}


def multiplies(kernel: str, shape: str) -> bool:
    return False


def launches(shape: str) -> list[Launch]:
    model, rows = SHAPES[shape]
    with recording(*MODULES) as found:
        gate_up = meta(rows, 2 * model.width, dtype=model.dtype)
        gated_activation.gated_activation(gate_up, "gelu_tanh" if model.is_gemma else "silu")
    return found
