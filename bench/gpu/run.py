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
from bench.gpu import engine, kernels, targets
from bench.gpu.timing import Stopwatch
from bench.measure import RESULTS
from engine.roofline import Roofline, measured

STAGES = {"kernels": kernels.measure, "engine": engine.measure}
LINES = {"kernels": targets.kernel_lines, "engine": targets.engine_lines}


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
    if args.dry_run:
        os.environ.setdefault("DIFFPO_LOOP", "device")  # the loop of GPUs, without graphs
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
        path = out / f"{stage}_gpu{'_dry_run' if args.dry_run else ''}.json"
        failed |= ours_failed(recorded(stage, path, watch, limits, tiny=args.dry_run, deadline=deadline))
    sys.exit(failed)


def recorded(
    stage: str, path: Path, watch: Stopwatch, ceilings: Roofline, *, tiny: bool, deadline: float
) -> dict[str, Any]:
    """The results of a stage, which are in the file too, and what they say about its targets, which is printed."""
    record = {"machine": hardware(), "ceilings": dataclasses.asdict(ceilings)}
    results: dict[str, Any] = {}
    for results in STAGES[stage](watch, ceilings, tiny=tiny, deadline=deadline):
        # whenever there is more: the time may end before the stage does
        path.write_text(json.dumps(record | {stage: results}, indent=1) + "\n")
    for line in LINES[stage](results):
        print(f"{line.what:66} {line.found}{f'  (wanted: {line.target})' if line.target else ''}")
    print(path, flush=True)
    return results


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
