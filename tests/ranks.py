"""Runs a function in several processes that are joined by gloo, and brings back what it returns on each."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.train import end_rank

ROOT = Path(__file__).parents[1]
DEADLINE = 240
"""Seconds; a rank that waits for a dead one would wait for ever."""


def on_ranks(function: str, folder: Path, world: int = 2) -> list[Any]:
    """Results of ``function`` ("module:name", no arguments) on every rank: whatever torch.save takes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ranks", function, str(folder), str(world)]
    logs = [folder / f"{rank}.log" for rank in range(world)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            processes.append(
                subprocess.Popen([*command, str(rank)], env=environment, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(DEADLINE) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not any(codes), "\n".join(log.read_text()[-4000:] for log in logs)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def main() -> None:
    function, folder, world, rank = sys.argv[1:]
    module, name = function.split(":")
    call = getattr(importlib.import_module(module), name)
    store = Path(folder, "store")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world))
    torch.save(call(), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
    end_rank(0)


if __name__ == "__main__":
    main()
