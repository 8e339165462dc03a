"""The consistency loss on a CPU against eager PyTorch, torch.compile and the chunked losses that run there.

    python -m bench.bench_consistency_loss [--quick] [--states FILE] [--only fp32-32k,states-bf16,...] [--rounds N]

Loss and gradients of both streams and the head. The variants take turns in one process for the times; each gets a process
of its own for the peak memory (high-water mark above what the inputs take; gradients included and, beside it, subtracted).
With ``--states``, hidden states of a trained model (bench/trained_states.py makes such a file), also the sparse plan, every
gradient's error against float64 beside its time. ``make report`` makes the tables of the results.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.consistency_states import exact_gradients, relative_error
from bench.consistency_variants import OMEGA, SHAPES, Shape, eager, inputs, known_shapes, ours, step, variants
from bench.measure import interleaved, machine, medians, ratio, save, spread

MB = 1 << 20
DISTANCES = (0.3, 0.05, 0.01)


def times(shape: Shape, rounds: int) -> dict[str, Any]:
    """Seconds of the variants in turn."""
    leaves, labels = inputs(shape)
    calls = {n: lambda f=f: step(f, leaves, labels, shape.softcap) for n, f in variants(shape).items()}
    seconds = interleaved(calls, rounds)
    flop = 12 * shape.rows * shape.d * shape.v
    out: dict[str, Any] = {
        "shape": [shape.rows, shape.d, shape.v],
        "rounds": rounds,
        "median_seconds": medians(seconds),
        "spread": spread(seconds),
    }
    for name in (name for name in calls if name.startswith("ours")):
        out |= {f"{name}/{peer}": 1 / ratio(seconds, peer, name) for peer in ("eager", "compile")}
    out["GFLOP/s of six units"] = {n: flop / s / 1e9 for n, s in out["median_seconds"].items() if "only" not in n}
    return out


def product_ceiling(shape: Shape) -> float:
    """GFLOP/s of torch.mm at this shape, in blocks of the vocabulary: the floor of six units in a BLAS."""
    a, b = torch.randn(2 * shape.rows, shape.d).to(shape.dtype), torch.randn(2048, shape.d).to(shape.dtype)
    seconds = interleaved({"mm": lambda: torch.mm(a, b.T)}, 9)["mm"]
    return 2 * len(a) * shape.d * 2048 / sorted(seconds)[4] / 1e9


def peak_memory(name: str, variant: str, states: Path | None, filters: str) -> dict[str, float]:
    """MB above the inputs, in a process of its own; one small call before loads the libraries."""
    command = [sys.executable, "-m", "bench.bench_consistency_loss", "--memory-of", variant, "--only", name]
    command += [] if states is None else ["--states", str(states), "--filter-eps", filters]
    # freed memory goes back to the system at once, and does not count as there before
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MB)}
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def measure_memory(shape: Shape, variant: str) -> dict[str, float]:
    """In this process; see peak_memory."""
    loss = variants(shape)[variant]
    warm, y = inputs(Shape(48, 64, 500, shape.dtype, shape.softcap))
    step(loss, warm, y, shape.softcap)
    leaves, labels = inputs(shape)
    if variant == "compile" or "cut" in variant:
        step(loss, leaves, labels, shape.softcap)  # compiling takes memory of its own
        for leaf in leaves:
            leaf.grad = None
    trained = leaves[::2] if "CE only" in variant else leaves
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in trained) / MB
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # resets the high-water mark: the inputs were made in float32
    before = _status("VmRSS")
    step(loss, leaves, labels, shape.softcap)
    peak = max(_status("VmHWM") - before, 0)
    return {"peak_MB": peak, "beyond_gradients_MB": peak - gradients}


def _status(key: str) -> float:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(key))
    return int(line.split()[1]) / 1024


def gradient_errors(shape: Shape) -> dict[str, dict[str, float]]:
    """Relative error of every gradient of every complete loss against float64, rounding of the output included."""
    leaves, labels = inputs(shape)
    exact = exact_gradients(leaves, labels, OMEGA)

    def errors(grads: Iterable[Tensor]) -> dict[str, float]:
        return {n: relative_error(g, e) for n, g, e in zip(("target", "draft", "head"), grads, exact, strict=True)}

    found = {"output's own rounding": errors(e.to(shape.dtype) for e in exact)}
    for name, loss in variants(shape).items():
        found[name] = errors(torch.autograd.grad(loss(*leaves, labels, None), leaves))
    return found


def accuracy(shape: Shape, distance: float) -> dict[str, float]:
    """Relative error of the drafts' gradient against float64, eager and ours, rounding of the output included."""
    leaves, labels = inputs(shape, distance)
    exact = exact_gradients(leaves, labels, OMEGA)[1]
    grads = {"output's own rounding": exact.to(shape.dtype)}
    for name, loss in (("eager", eager), ("ours", ours)):
        grads[name] = torch.autograd.grad(loss(*leaves, labels, None), leaves[1])[0]
    return {name: relative_error(grad, exact) for name, grad in grads.items()}


def measure(name: str, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """Times, memory and, on hidden states from a file, errors."""
    size = max(shape.v * shape.d / (32000 * 1024), 1)
    rounds = 1 if args.quick else max(min(3, args.rounds), round(args.rounds / size))
    out: dict[str, Any] = {"mm GFLOP/s": product_ceiling(shape), **times(shape, rounds)}
    if shape.states is not None:
        out["gradient errors"] = gradient_errors(shape)
    memory = {variant: peak_memory(name, variant, shape.states, args.filter_eps) for variant in variants(shape)}
    return out | {
        "memory": memory,
        "ours beyond gradients / eager": memory["ours"]["beyond_gradients_MB"] / memory["eager"]["peak_MB"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, one round: a check that everything runs")
    parser.add_argument("--states", type=Path, help="safetensors with target, draft, weight and labels")
    parser.add_argument("--filter-eps", default="0.01,0.02,0.03", help="of the sparse plan, separated by commas")
    parser.add_argument("--only", help=f"shapes, separated by commas: {', '.join(SHAPES)}, states-fp32, states-bf16")
    parser.add_argument(
        "--rounds", type=int, default=5, help="at V = 32,000; large shapes get fewer, three at least of three or more"
    )
    parser.add_argument("--name", default="consistency_loss_cpu", help="file name under bench/results/")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    filters = tuple(float(eps) for eps in args.filter_eps.split(",") if eps)
    shapes = known_shapes(args.states, filters)
    if args.memory_of:
        print(json.dumps(measure_memory(shapes[args.only], args.memory_of)))
        return
    wanted = [name for name in shapes if ("quick" in name) == args.quick]
    chosen = args.only.split(",") if args.only else wanted
    if unknown := set(chosen) - set(shapes):
        parser.error(f"unknown shapes {sorted(unknown)}, known are {list(shapes)}; states-* need --states")
    results: dict[str, Any] = {"machine": machine()}
    streams = {"random": Shape(64, 1024, 8000, torch.bfloat16)}
    if args.states is not None:
        streams["trained"] = Shape(64, 1024, 128256, torch.bfloat16, None, args.states)
    results["accuracy"] = {
        kind: {str(distance): accuracy(shape, distance) for distance in DISTANCES} for kind, shape in streams.items()
    }
    print(f"accuracy: {json.dumps(results['accuracy'], indent=1)}", flush=True)
    for name in chosen:
        results[name] = measure(name, shapes[name], args)
        print(f"{name}: {json.dumps(results[name], indent=1)}", flush=True)
        save("consistency_loss_quick" if args.quick else args.name, results)


if __name__ == "__main__":
    main()
