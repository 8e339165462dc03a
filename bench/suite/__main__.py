"""See bench.suite."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bench.suite
from bench.measure import RESULTS, command
from bench.suite.case import SIZES
from bench.suite.passes import duration, lines, merged

ROOT = Path(__file__).parents[2]
SECONDS = {"tiny": 0.001, "quick": 0.1, "full": 0.5}
"""Of every test, in rounds of a millisecond or more."""
LEAST_ROUNDS, LEAST_PASSES = 3, 2


def one_pass(folder: Path, number: int, args: argparse.Namespace) -> Path:
    """Runs all tests once; returns the JSON file."""
    out = folder / f"pass-{number}.json"
    asked = [
        sys.executable, "-m", "pytest", "bench/suite", "-q", "-p", "no:cacheprovider", f"--size={args.size}",
        "--benchmark-only",
        f"--benchmark-json={out}", f"--benchmark-max-time={SECONDS[args.size]}", "--benchmark-min-time=0.001",
        f"--benchmark-min-rounds={LEAST_ROUNDS}", "--benchmark-columns=min,median,max,rounds", "--benchmark-disable-gc",
    ]  # fmt: skip
    asked += ["--backwards"] if number % 2 else []
    asked += [f"--threads={args.threads}"] if args.threads else []
    asked += ["-k", args.keyword] if args.keyword else []
    subprocess.run(asked, cwd=ROOT, check=True, stdout=None if args.verbose else subprocess.DEVNULL)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.suite",
        description=bench.suite.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="quick")
    parser.add_argument(
        "--passes",
        type=int,
        default=4,
        help="two at least; bench.compare needs three, and tells smaller changes with more; Ctrl-C keeps those that are done",
    )
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch and the kernels; 0: as they are")
    parser.add_argument("-k", dest="keyword", help="only tests whose names match, as pytest has it")
    parser.add_argument("--out", type=Path, default=RESULTS / "suite.json")
    parser.add_argument("--note", help="what else a reader must know, such as what ran beside it")
    parser.add_argument("--verbose", action="store_true", help="pytest-benchmark's tables of every pass")
    args = parser.parse_args()
    if args.passes < LEAST_PASSES:
        parser.error(
            f"--passes must be at least {LEAST_PASSES}, got {args.passes}: noise is told from how passes differ"
        )
    folder = ROOT / "build" / "suite" / args.out.stem
    start, load = time.monotonic(), os.getloadavg()[0]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found, notes = [], [args.note] if args.note else []
    for number in range(args.passes):
        try:
            found.append(json.loads(one_pass(folder, number, args).read_text()))
        except KeyboardInterrupt:
            if len(found) < LEAST_PASSES:
                raise
            notes.append(f"stopped after {len(found)} of {args.passes} passes")
            break
        print(f"pass {number + 1} of {args.passes}: {time.monotonic() - start:.0f} s", flush=True)
    about = {"command": command(), "load_before": load, "load_after": os.getloadavg()[0],
             "seconds": round(time.monotonic() - start)}  # fmt: skip
    run = merged(found, about) | ({"note": "; ".join(notes)} if notes else {})
    args.out.write_text(json.dumps(run, indent=1) + "\n")
    for line in lines(run):
        ratio = "" if line.over_engine is None else "{:6.2f} ({:.2f} to {:.2f})".format(*line.over_engine)
        what = f"{line.operation:18} {line.shape:14} {line.dtype:9} {line.implementation:22}"
        print(f"{what} {duration(line.seconds[0]):>9} {ratio}")
    print(f"{args.out}\nRatios: time over the engine's, median, least and most over {len(found)} passes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
