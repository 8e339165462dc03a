"""See bench.scaling."""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import bench.scaling
from bench.measure import RESULTS, machine
from bench.scaling import memory
from bench.scaling.curves import CURVES, Curve
from bench.scaling.fit import exponent
from bench.scaling.plot import plot

LEAST_SECONDS = 0.003
"""Of what is timed at once: short calls are repeated."""
MEMORY_ROUNDS = 3


def seconds(curve: Curve, rounds: int | None) -> dict[str, list[list[float]]]:
    """Of one call, by variant, size and round; the rounds take all sizes and variants in turn."""
    built = [curve.build(size) for size in curve.sizes]
    repeats = [{name: repeat(call) for name, call in calls.items()} for calls in built]
    found: dict[str, list[list[float]]] = {name: [[] for _ in curve.sizes] for name in built[0]}
    for _ in range(rounds or curve.rounds):
        for i, calls in enumerate(built):
            for name, call in calls.items():
                start = time.perf_counter()
                for _ in range(repeats[i][name]):
                    call()
                taken = (time.perf_counter() - start) / repeats[i][name]
                found[name][i].append(float(f"{taken:.4g}"))
    return found


def repeat(call: Callable[[], Any]) -> int:
    """How often a call is made for one timing; warms it up."""
    fastest = float("inf")
    for _ in range(3):  # one of them may meet another process, the first has cold caches
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
        if fastest > 100 * LEAST_SECONDS:
            break
    return max(1, round(LEAST_SECONDS / max(fastest, 1e-7)))


def record(curve: Curve, unit: str, values: dict[str, list[list[float]]]) -> dict[str, Any]:
    """A curve as it stands in the file."""
    fitted = {name: dataclasses.asdict(exponent(curve.sizes, rounds)) for name, rounds in values.items()}
    for name, found in fitted.items():
        print(f"{curve.name:18} {unit:3} against {curve.x:20} {name:15} exponent {found['exponent']:.2f}"
              f" ({found['low']:.2f} to {found['high']:.2f}), expected {curve.expected[name]}", flush=True)  # fmt: skip
    return {"name": curve.name, "x": curve.x, "unit": unit, "sizes": curve.sizes, "expected": curve.expected,
            "values": values, "exponents": fitted}  # fmt: skip


def measurements(rounds: int | None) -> Iterator[tuple[Curve, str, Callable[[], dict[str, list[list[float]]]]]]:
    """Every curve, its unit and what measures it."""
    for curve in CURVES:
        yield curve, "s", partial(seconds, curve, rounds)
    for axis, (sizes, _) in memory.AXES.items():
        curve = Curve("consistency_loss", axis, sizes, memory.EXPECTED, lambda size: {})
        yield curve, "MB", partial(memory.measured, axis, rounds or MEMORY_ROUNDS)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling",
        description=bench.scaling.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", help="curves by the beginning of their names, separated by commas")
    parser.add_argument("--rounds", type=int, help="of every curve")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="scaling", help="file name under bench/results/")
    parser.add_argument("--note", help="what else a reader must know, such as what ran beside it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"machine": machine()} | ({"note": args.note} if args.note else {}) | {"curves": []}
    path = RESULTS / f"{args.name}.json"
    start = time.monotonic()
    for curve, unit, measure in measurements(args.rounds):
        if curve.name.startswith(tuple(args.only.split(","))):
            results["curves"].append(record(curve, unit, measure()))
            results["machine"] |= {"load_after": os.getloadavg()[0], "seconds": round(time.monotonic() - start)}
            path.write_text(json.dumps(results, indent=1) + "\n")
            plot(results, path.with_suffix(".png"))  # curve by curve: an interrupted run keeps them
    print(f"{path}, {results['machine']['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
