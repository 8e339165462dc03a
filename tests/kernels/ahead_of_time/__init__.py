"""One module per operation; ``compiling.py`` says what they have in common."""

from types import ModuleType

from tests.kernels.ahead_of_time import consistency_loss

OPERATIONS: dict[str, ModuleType] = {"consistency_loss": consistency_loss}
