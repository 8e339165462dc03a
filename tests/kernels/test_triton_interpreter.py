"""The Triton kernels under Triton's interpreter: every file of ``*_triton_*cases.py``, in a process of its own.

Whether Triton interprets is decided when a kernel is defined, so it cannot be switched on here.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("cases", sorted(Path(__file__).parent.glob("*_triton_*cases.py")), ids=lambda path: path.stem)
def test_kernels_in_the_interpreter(cases: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]  # of the process above, which may be one of several
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "-W", "ignore", str(cases)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cases.parents[2], check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
