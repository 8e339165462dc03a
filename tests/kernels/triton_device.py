"""Where the ``*_triton_*cases.py`` run: on a GPU, or under Triton's interpreter on a CPU."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DEVICE = "cpu" if INTERPRETED else "cuda"

if INTERPRETED:
    from tests.kernels.triton_interpreter import repair

    repair()
