"""One module per operation; ``compiling.py`` says what they have in common."""

from types import ModuleType

from tests.kernels.ahead_of_time import consistency_loss, linear_argmax, linear_sample

OPERATIONS: dict[str, ModuleType] = {
    "consistency_loss": consistency_loss,
    "linear_argmax": linear_argmax,
    "linear_sample": linear_sample,
}
