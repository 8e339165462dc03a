"""Kernels and engine on a GPU, timed: the stages of bench/gpu.sh that are not tests.

    python -m bench.gpu.run [--stages kernels,engine] [--seconds 240] [--dry-run]

Writes <stage>_gpu.json to $OUT or bench/results/; exit status 1 if anything of ours failed. ``--dry-run``: the same code on
tiny shapes on a CPU, with TRITON_INTERPRET=1 the Triton kernels too.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.bench_consistency_loss_gpu import hardware
from bench.gpu import engine, kernels
from bench.gpu.timing import Stopwatch
from bench.measure import RESULTS
from engine.roofline import measured

STAGES = {"kernels": kernels.measure, "engine": engine.measure}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES), help="separated by commas")
    parser.add_argument("--seconds", type=float, default=240, help="start nothing new after this")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU: does every path run?")
    args = parser.parse_args()
    stages = args.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"unknown stages {sorted(unknown)}: choose from {', '.join(STAGES)}")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU here: --dry-run runs the same code on a CPU")
    start = time.monotonic()
    device = torch.device("cpu" if args.dry_run else "cuda")
    out = Path(os.environ.get("OUT") or RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    watch = Stopwatch(device)
    sizes = {"copied": 1 << 20, "size": 64} if args.dry_run else {"copied": 1 << 30, "size": 8192}
    limits = measured(device, torch.bfloat16, **sizes)
    print(
        f"ceilings: {limits.bytes_per_second / 1e9:.0f} GB/s, {limits.flops_per_second / 1e12:.1f} TFLOP/s", flush=True
    )
    failed = False
    for number, stage in enumerate(stages):
        print(f"== {stage}", flush=True)
        left = start + args.seconds - time.monotonic()
        deadline = time.monotonic() + left / (len(stages) - number)
        results = STAGES[stage](watch, limits, tiny=args.dry_run, deadline=deadline)
        record = {"machine": hardware(), "ceilings": dataclasses.asdict(limits), stage: results}
        path = out / f"{stage}_gpu{'_dry_run' if args.dry_run else ''}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(path)
        failed |= ours_failed(results)
    sys.exit(failed)


def ours_failed(results: Any) -> bool:
    """Whether there is an error in these results that is not a peer's, or for want of time."""
    if isinstance(results, list):
        return any(map(ours_failed, results))
    if not isinstance(results, dict):
        return False
    if "no time" not in results.get("error", "no time"):
        return True
    parts = {name: value for name, value in results.items() if name != "variants"}
    parts |= {name: value for name, value in results.get("variants", {}).items() if name.startswith("ours")}
    return any(map(ours_failed, parts.values()))


if __name__ == "__main__":
    main()
