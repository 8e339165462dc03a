"""Kernels with products compiled for chips with 99 KiB of shared memory, less than those that their tiles were chosen for have.

Attention has tiles of its own there, the projections and the loss take the others' as they are. bench/results/triton_aot has
no tables of these chips.
"""

import pytest

triton = pytest.importorskip("triton")

from tests.kernels.ahead_of_time import OPERATIONS, paged_attention  # noqa: E402
from tests.kernels.ahead_of_time.compiling import Launch, figures  # noqa: E402

pytestmark = pytest.mark.slow

SHARED_LIMIT = 99 << 10
EVERY_TILE = (
    "gemma-2-9b, 256 rows of 1", "gemma-2-2b, 4 rows of 4", "llama-3-8b, 256 rows of 1", "llama-3-8b, 8 rows of 8",
    "qwen-2.5-0.5b, 2048 rows of 8", "gemma-2-9b, fp32", "llama-3-8b, fp32",
)  # fmt: skip
ATTENTION = {name: paged_attention.SHAPES[name] for name in EVERY_TILE} | {
    "qwen-2.5-0.5b, 8 rows of 8": paged_attention.Shape(14, 2, 64, None, 0, 8, 8),
}
LARGEST = {"linear_argmax": "gemma-2-9b, 256 rows", "consistency_loss": "llama-3-8b"}
"""linear_sample multiplies like linear_argmax, in smaller tiles."""
BEFORE_3_9 = triton.__version__ < "3.9"
SPILLED = {
    ("attention_kernel", 86): 20 if BEFORE_3_9 else 16,
    ("attention_kernel", 120): 104 if BEFORE_3_9 else 0,
    ("gathered_kernel", 86): 124 if BEFORE_3_9 else 0,
    ("gathered_kernel", 120): 108 if BEFORE_3_9 else 0,
}
"""Bytes at most that a thread stores and loads, of the kernels that spill at all there."""


def check(launch: Launch, chip: int, precise: bool) -> None:
    found = figures(launch, chip)
    print(f"sm_{chip} {launch.name}: {found}")
    kernel = launch.kernel.__name__
    assert found.shared <= SHARED_LIMIT
    assert found.spilled <= SPILLED.get((kernel, chip), 0)
    assert found.registers * 32 * launch.warps <= 65536
    multiplies = kernel.startswith(("project", "gathered", "attention")) and not precise
    assert found.tensor_cores == ("mma.sync" if multiplies else None)


@pytest.mark.parametrize("chip", [86, 120])
@pytest.mark.parametrize("shape", ATTENTION)
def test_attention_fits(shape: str, chip: int) -> None:
    for launch in paged_attention.launches_on(chip, ATTENTION[shape]):
        check(launch, chip, "fp32" in shape)


@pytest.mark.parametrize("chip", [86, 120])
@pytest.mark.parametrize("operation", LARGEST)
def test_products_fit(operation: str, chip: int) -> None:
    for launch in OPERATIONS[operation].launches(LARGEST[operation]):
        check(launch, chip, False)
