"""Peak memory of the consistency loss beyond its gradients, in a process that does nothing else. Linux."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.consistency_variants import Shape, inputs, step
from bench.scaling.curves import LOSSES

MB = 1 << 20
LEAST = 0.1
"""MB; what is less counts as this: the system tells memory by pages, and a logarithm needs something."""
AXES = {
    "vocabulary": ((4096, 8192, 16384, 32768, 65536), lambda v: Shape(256, 256, v, torch.float32)),
    "rows of each stream": ((64, 128, 256, 512, 1024), lambda n: Shape(n, 256, 16384, torch.float32)),
}
EXPECTED = {"engine": "0", "eager": "1"}


def measured(axis: str, rounds: int, sizes: Sequence[int] | None = None) -> dict[str, list[list[float]]]:
    """MB by variant, size (None: all of the axis) and round; a process of its own, whose freed memory goes back at once."""
    asked = [sys.executable, "-m", "bench.scaling.memory", axis, str(rounds), *map(str, sizes or AXES[axis][0])]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MB)}
    done = subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, list[list[float]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def status(key: str) -> float:
    """MB of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / MB


def peak(variant: str, shape: Shape) -> float:
    """MB beyond inputs and gradients."""
    leaves, labels = inputs(shape)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves) / MB
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = status("VmRSS")
    step(LOSSES[variant], leaves, labels, None)
    return max(status("VmHWM") - before - gradients, LEAST)


def main() -> None:
    axis, (rounds, *sizes) = sys.argv[1], map(int, sys.argv[2:])
    shape = AXES[axis][1]
    for variant in LOSSES:
        peak(variant, Shape(48, 64, 500, torch.float32))  # loads the libraries
    found: dict[str, list[list[float]]] = {variant: [[] for _ in sizes] for variant in LOSSES}
    for _ in range(rounds):
        for i, size in enumerate(sizes):
            for variant in LOSSES:
                found[variant][i].append(round(peak(variant, shape(size)), 3))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
