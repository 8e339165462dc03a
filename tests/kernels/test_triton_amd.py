"""Kernels compiled for gfx942 (MI300X): they all do, most would fit. None is launched there: see ``triton_choice``."""

import re

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from tests.kernels.ahead_of_time import OPERATIONS  # noqa: E402
from tests.kernels.ahead_of_time.compiling import source  # noqa: E402

pytestmark = pytest.mark.slow

SHARED_LIMIT = 64 << 10
TOO_LARGE = {"gathered_kernel", "project_argmax_kernel", "project_sample_kernel", "attention_kernel"}
"""Their tiles, sized for NVIDIA's chips, need more shared memory, or spill; others would have to be found for this chip."""
PRODUCTS = re.compile(r"project|gathered|attention")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_for_gfx942(operation: str) -> None:
    """Its first shape, with the options of sm_90."""
    shape = next(iter(OPERATIONS[operation].SHAPES))
    for launch in OPERATIONS[operation].launches(shape):
        if 90 not in launch.chips:
            continue
        name = launch.kernel.__name__
        compiled = triton.compile(source(launch), target=GPUTarget("hip", "gfx942", 64), options=launch.options)
        assembly = compiled.asm["amdgcn"]
        spilled = re.findall(r"\.vgpr_spill_count:\s*(\d+)", assembly)
        print(launch.name, spilled, compiled.metadata.shared)
        assert bool(PRODUCTS.search(name)) == ("mfma" in assembly), "its matrix instructions"
        if name not in TOO_LARGE:
            assert spilled == ["0"]
            assert compiled.metadata.shared <= SHARED_LIMIT
