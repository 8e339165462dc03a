"""What the tests of the GPU benchmark share."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.gpu.case import Case, difference

ROOT = Path(__file__).parents[2]

CPU = torch.device("cpu")


def case_of(variants: dict[str, Callable[[], object]], right: object, shape: str = "6", size: int = 48) -> Case:
    return Case("doubling", shape, variants, size, 6, lambda out: difference(out, right), 1e-3)


class Clock:
    """Stands in for the module ``time``; moved by hand."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


def interpreted(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script, and what it becomes, on the kernels in Triton's interpreter."""
    environment = (
        os.environ | {"TRITON_INTERPRET": "1", "DIFFPO_CPU_KERNELS": "torch", "OMP_NUM_THREADS": "1"} | variables
    )
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
