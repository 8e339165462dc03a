"""Registers, spills, shared memory and tensor-core instructions of every Triton kernel of the loss, without a GPU.

    python -m bench.triton_table [--jobs 2]

Compiles for compute capabilities 8.0, 9.0 and 10.0 what the launchers would launch, prints the table and writes it to
bench/results/triton_aot.json, which tests/kernels/test_triton_compile.py holds later compilations against.
"""

import argparse
import dataclasses
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import triton

from bench.measure import save
from tests.kernels import triton_ahead_of_time as ahead


def column(shape: str, chip: int) -> dict[str, dict[str, Any]]:
    """Of every kernel launched for one shape, its figures on one chip."""
    launches = ahead.launches(ahead.SHAPES[shape])
    return {launch.name: dataclasses.asdict(ahead.figures(launch, chip)) for launch in launches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    args = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(args.jobs) as pool:
        found = {(s, c): pool.submit(column, s, c) for s in ahead.SHAPES for c in ahead.CHIPS}
        for (shape, chip), future in found.items():
            figures.setdefault(shape, {})[f"sm_{chip}"] = kernels = future.result()
            print(f"{shape}, sm_{chip}")
            for name, kernel in kernels.items():
                print(
                    f"  {name:75} {kernel['registers']:4} registers {kernel['spilled']:4} B spilled "
                    f"{kernel['shared'] / 1024:6.1f} KiB shared  {kernel['tensor_cores'] or ''}", flush=True,
                )  # fmt: skip
    print(save("triton_aot", {"triton": triton.__version__, "figures": figures}))


if __name__ == "__main__":
    main()
