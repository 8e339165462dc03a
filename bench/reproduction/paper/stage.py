"""Runs one stage of paper.sh and records the seconds it took, of the clock and of the processor."""

import argparse
import resource
import subprocess
import time
from pathlib import Path

from bench.reproduction.paper.results import update


def main() -> None:
    """Command line: what follows the name is the command; its failure is this one's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("name")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    start = time.monotonic()
    status = subprocess.run(args.command, check=False).returncode
    if status:
        raise SystemExit(status)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = {"clock": round(time.monotonic() - start), "processor": round(used.ru_utime + used.ru_stime)}
    update(args.results, f"seconds/{args.name}", seconds)
    print(f"{args.name}: {seconds['processor']} s of processor time", flush=True)


if __name__ == "__main__":
    main()
