"""One module per operation; ``compiling.py`` says what they have in common."""

from types import ModuleType

from tests.kernels.ahead_of_time import (
    consistency_loss,
    gated_activation,
    jacobi,
    linear_argmax,
    linear_sample,
    paged_attention,
    rms_norm,
    rope_kv_write,
)

OPERATIONS: dict[str, ModuleType] = {
    "consistency_loss": consistency_loss,
    "gated_activation": gated_activation,
    "jacobi": jacobi,
    "linear_argmax": linear_argmax,
    "linear_sample": linear_sample,
    "paged_attention": paged_attention,
    "rms_norm": rms_norm,
    "rope_kv_write": rope_kv_write,
}
