"""Kernels and engine on a GPU, timed: the stages of bench/gpu.sh that are not tests.

    python -m bench.gpu.run [--stages kernels,engine] [--models gemma-2-9b] [--seconds 240] [--dry-run]

Writes <stage>_gpu.json to $OUT or bench/results/; exit status 1 if anything of ours failed or was wrong. ``--dry-run``: the
same code on tiny shapes on a CPU, with TRITON_INTERPRET=1 on the Triton kernels.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.bench_consistency_loss_gpu import hardware
from bench.gpu import engine, kernels, targets
from bench.gpu.dry_run import prepare
from bench.gpu.restart import DeviceLost, start_over
from bench.gpu.timing import Stopwatch
from bench.measure import RESULTS, written
from engine.roofline import Roofline, measured

STAGES = {"kernels": kernels.measure, "engine": engine.measure}
LINES = {"kernels": targets.kernel_lines, "engine": targets.engine_lines}
RATED = {"kernels": kernels.rated, "engine": engine.rated}
WARM_UP_SECONDS = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES), help="separated by commas")
    parser.add_argument("--models", help=f"of the engine, separated by commas; default: {','.join(engine.MODELS)}")
    parser.add_argument("--seconds", type=float, default=240, help="start nothing new after this")
    parser.add_argument("--begun", default="", help="stages of which there are results already, which are gone on with")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU: does every path run?")
    args = parser.parse_args()
    stages = args.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"unknown stages {sorted(unknown)}: choose from {', '.join(STAGES)}")
    if unknown := set(args.models.split(",") if args.models else ()) - {*engine.MODELS, "tiny"}:
        parser.error(f"unknown models {sorted(unknown)}: choose from {', '.join(engine.MODELS)}")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU here: --dry-run runs the same code on a CPU")
    logging.basicConfig(level=logging.WARNING)  # a kernel that is not launched, a graph that is not captured
    if args.dry_run:
        prepare()
    start = time.monotonic()
    device = torch.device("cpu" if args.dry_run else "cuda")
    out = Path(os.environ.get("OUT") or RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    watch = Stopwatch(device)
    failed, begun = False, set(filter(None, args.begun.split(",")))
    for number, stage in enumerate(stages):
        print(f"== {stage}", flush=True)
        left = start + args.seconds - time.monotonic()
        path = out / f"{stage}_gpu{'_dry_run' if args.dry_run else ''}.json"
        before = json.loads(path.read_text())[stage] if stage in begun and path.exists() else {}
        options: dict[str, Any] = {"tiny": args.dry_run, "deadline": time.monotonic() + left / (len(stages) - number)}
        options |= {"models": args.models.split(",")} if args.models and stage == "engine" else {}
        try:
            failed |= ours_failed(recorded(stage, path, watch, options | {"before": before}))
        except DeviceLost:
            left = start + args.seconds - time.monotonic()
            begun |= set(stages[: number + 1])
            start_over("bench.gpu.run", "--seconds", f"{left:.0f}", "--begun", ",".join(sorted(begun)))
    sys.exit(failed)


def ceilings_of(device: torch.device, tiny: bool) -> Roofline:
    """Measured on a device that has been busy for a while, whose clocks are what they are under load."""
    sizes = {"copied": 1 << 20, "size": 64} if tiny else {"copied": 1 << 30, "size": 8192}
    until = time.monotonic() + (0 if tiny else WARM_UP_SECONDS)
    while time.monotonic() < until:
        measured(device, torch.bfloat16, **sizes)
    return measured(device, torch.bfloat16, **sizes)


def recorded(stage: str, path: Path, watch: Stopwatch, options: dict[str, Any]) -> dict[str, Any]:
    """The results of a stage, which are in the file too, and what they say about its targets, which is printed."""
    first = ceilings_of(watch.device, options["tiny"])
    record = {"machine": hardware(), "ceilings": dataclasses.asdict(first)}
    results: dict[str, Any] = {}
    for results in STAGES[stage](watch, first, **options):
        # whenever there is more: the time may end before the stage does
        written(path, record | {stage: results})
    # before and after, the higher ones count: less than what the device can do would flatter us
    last = ceilings_of(watch.device, options["tiny"])
    best = Roofline(*map(max, dataclasses.astuple(first), dataclasses.astuple(last)))
    RATED[stage](results, best)
    record |= {
        "ceilings": dataclasses.asdict(best),
        "ceilings_each_time": [dataclasses.asdict(first), dataclasses.asdict(last)],
    }
    written(path, record | {stage: results})
    print(f"ceilings: {best.bytes_per_second / 1e9:.0f} GB/s, {best.flops_per_second / 1e12:.1f} TFLOP/s", flush=True)
    for line in LINES[stage](results):
        print(f"{line.what:66} {line.found}{f'  (wanted: {line.target})' if line.target else ''}")
    print(path, flush=True)
    return results


def ours_failed(results: Any) -> bool:
    """Whether there is an error in these results, a wrong output among them, that is not a peer's, or for want of time."""
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
