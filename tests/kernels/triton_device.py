"""Where the ``*_triton_*cases.py`` run: on a GPU, or under Triton's interpreter on a CPU."""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DEVICE = "cpu" if INTERPRETED else "cuda"
beyond_32_bits = pytest.mark.skipif(INTERPRETED, reason="more than 2^31 elements need a GPU's speed")

if INTERPRETED:
    from tests.kernels.triton_interpreter import repair

    repair()
