"""Registers, spills, shared memory, tensor-core instructions and widest loads of every Triton kernel, without a GPU.

    python -m bench.triton_table [--jobs 2] [operation ...]

Compiles for compute capabilities 8.0, 9.0 and 10.0 what the launchers would launch, prints the table and writes one file per
operation to bench/results/triton_aot/, which tests/kernels/test_triton_compile.py holds later compilations against.
"""

import argparse
import dataclasses
import json
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import triton

from bench.measure import RESULTS
from tests.kernels.ahead_of_time import OPERATIONS
from tests.kernels.ahead_of_time.compiling import CHIPS, figures


def column(operation: str, shape: str, chip: int) -> dict[str, dict[str, Any]]:
    """Of every kernel launched for one shape, its figures on one chip."""
    launches = [launch for launch in OPERATIONS[operation].launches(shape) if chip in launch.chips]
    return {launch.name: dataclasses.asdict(figures(launch, chip)) for launch in launches}


def write(operation: str, pool: ProcessPoolExecutor) -> None:
    """Compiles one operation and writes its table."""
    table: dict[str, dict[str, Any]] = {}
    shapes = OPERATIONS[operation].SHAPES
    found = {(s, c): pool.submit(column, operation, s, c) for s in shapes for c in CHIPS}
    for (shape, chip), future in found.items():
        table.setdefault(shape, {})[f"sm_{chip}"] = kernels = future.result()
        print(f"{operation}, {shape}, sm_{chip}")
        for name, kernel in kernels.items():
            print(
                f"  {name:75} {kernel['registers']:4} registers {kernel['spilled']:4} B spilled "
                f"{kernel['shared'] / 1024:6.1f} KiB shared {kernel['load_bytes']:3} B a load  {kernel['tensor_cores'] or ''}",
                flush=True,
            )  # fmt: skip
    at = RESULTS / "triton_aot" / f"{operation}.json"
    at.parent.mkdir(exist_ok=True)
    at.write_text(json.dumps({"triton": triton.__version__, "figures": table}, indent=1) + "\n")
    print(at)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", metavar="operation", help=f"of {', '.join(OPERATIONS)}; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    args = parser.parse_args()
    if unknown := set(args.operations) - set(OPERATIONS):
        parser.error(f"unknown operations {sorted(unknown)}: choose from {', '.join(OPERATIONS)}")
    with ProcessPoolExecutor(args.jobs) as pool:
        for operation in args.operations or OPERATIONS:
            write(operation, pool)


if __name__ == "__main__":
    main()
