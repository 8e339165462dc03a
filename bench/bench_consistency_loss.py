"""The consistency loss on a CPU against eager PyTorch, torch.compile and the chunked losses that run there.

    python -m bench.bench_consistency_loss [--quick] [--only fp32-32k,bf16-32k,...] [--rounds N]

Loss and gradients of both streams and the head. The variants take turns in one process for the times; each gets a process
of its own for the peak memory (high-water mark above what the inputs take; gradients included and, beside it, subtracted).
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import interleaved, machine, medians, ratio, save
from engine import consistency_loss

OMEGA = 1e3
MB = 1 << 20


@dataclass(frozen=True)
class Shape:
    """Rows of each stream, hidden size, vocabulary."""

    rows: int
    d: int
    v: int
    dtype: torch.dtype
    softcap: float | None = None


SHAPES = {
    "fp32-32k": Shape(512, 1024, 32000, torch.float32),
    "bf16-32k": Shape(512, 1024, 32000, torch.bfloat16),
    "fp32-32k-softcap": Shape(512, 1024, 32000, torch.float32, 30.0),
    "bf16-32k-softcap": Shape(512, 1024, 32000, torch.bfloat16, 30.0),
    "fp32-128k": Shape(512, 1024, 128256, torch.float32),
    "bf16-128k": Shape(512, 1024, 128256, torch.bfloat16),
    "bf16-256k-softcap": Shape(1024, 2304, 256000, torch.bfloat16, 30.0),
}
QUICK = Shape(96, 256, 8000, torch.float32)


def inputs(shape: Shape, distance: float = 0.3) -> tuple[list[Tensor], Tensor]:
    """Leaves target, draft, head, at a relative distance between the streams, and labels."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(shape.rows, shape.d, generator=generator)
    draft = target + distance * torch.randn(shape.rows, shape.d, generator=generator)
    head = torch.randn(shape.v, shape.d, generator=generator).mul_(shape.d**-0.5)
    labels = torch.randint(0, shape.v, (shape.rows,), generator=generator)
    return [t.to(shape.dtype).requires_grad_() for t in (target, draft, head)], labels


def eager(target: Tensor, draft: Tensor, head: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """What a training script does: logits of the model's dtype, widened for the losses."""
    z_target, z_draft = F.linear(target, head).float(), F.linear(draft, head).float()
    if softcap:
        z_target, z_draft = softcap * torch.tanh(z_target / softcap), softcap * torch.tanh(z_draft / softcap)
    log_p, log_q = z_target.detach().log_softmax(-1), z_draft.log_softmax(-1)
    return F.cross_entropy(z_target, labels) + OMEGA * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def ours(target: Tensor, draft: Tensor, head: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """The same through the one operation."""
    pairs = torch.arange(len(draft))
    return consistency_loss(target, draft, head, labels, pairs, omega=OMEGA, softcap=softcap).loss


def variants(shape: Shape) -> dict[str, Callable[..., Tensor]]:
    """Complete losses, and peers for the cross entropy of one stream: those say what a half costs elsewhere."""
    compiled = torch.compile(eager)
    found: dict[str, Callable[..., Tensor]] = {"eager": eager, "compile": compiled, "ours": ours}
    if hasattr(F, "linear_cross_entropy") and not shape.softcap:
        found["torch_linear_ce (CE only)"] = lambda t, d, w, y, cap: F.linear_cross_entropy(t, w, y).float()
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["cut_cross_entropy (CE only)"] = lambda t, d, w, y, cap: linear_cross_entropy(
            t, w, y, softcap=cap, impl="torch_compile"
        )
    except ImportError:
        pass
    return found


def step(loss: Callable[..., Tensor], leaves: list[Tensor], labels: Tensor, softcap: float | None) -> None:
    """One forward and backward; gradients are dropped first, as optimizer.zero_grad does."""
    for leaf in leaves:
        leaf.grad = None
    loss(*leaves, labels, softcap).backward()


def times(shape: Shape, rounds: int) -> dict[str, Any]:
    """Seconds of the variants in turn."""
    leaves, labels = inputs(shape)
    calls = {n: lambda f=f: step(f, leaves, labels, shape.softcap) for n, f in variants(shape).items()}
    seconds = interleaved(calls, rounds)
    flop = 12 * shape.rows * shape.d * shape.v
    out: dict[str, Any] = {
        "median_seconds": medians(seconds),
        "spread": {name: [min(values), max(values)] for name, values in seconds.items()},
        "ours/eager": 1 / ratio(seconds, "eager", "ours"),
        "ours/compile": 1 / ratio(seconds, "compile", "ours"),
    }
    out["GFLOP/s of six units"] = {n: flop / s / 1e9 for n, s in out["median_seconds"].items() if "only" not in n}
    return out


def product_ceiling(shape: Shape) -> float:
    """GFLOP/s of torch.mm at this shape, in blocks of the vocabulary: the floor of six units in a BLAS."""
    a, b = torch.randn(2 * shape.rows, shape.d).to(shape.dtype), torch.randn(2048, shape.d).to(shape.dtype)
    seconds = interleaved({"mm": lambda: torch.mm(a, b.T)}, 9)["mm"]
    return 2 * len(a) * shape.d * 2048 / sorted(seconds)[4] / 1e9


def peak_memory(name: str, variant: str) -> dict[str, float]:
    """MB above the inputs, in a process of its own; one small call before loads the libraries."""
    command = [sys.executable, "-m", "bench.bench_consistency_loss", "--memory-of", variant, "--only", name]
    # freed memory goes back to the system at once, and does not count as there before
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MB)}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def measure_memory(shape: Shape, variant: str) -> dict[str, float]:
    """In this process; see peak_memory."""
    loss = variants(shape)[variant]
    warm, y = inputs(Shape(48, 64, 500, shape.dtype, shape.softcap))
    step(loss, warm, y, shape.softcap)
    leaves, labels = inputs(shape)
    if variant == "compile":
        step(loss, leaves, labels, shape.softcap)  # compiling takes memory of its own
        for leaf in leaves:
            leaf.grad = None
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves) / MB
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


def accuracy(distance: float) -> dict[str, float]:
    """Relative error of the drafts' bfloat16 gradient against float64, eager and ours, rounding of the output included."""
    shape = Shape(64, 1024, 8000, torch.bfloat16)
    leaves, labels = inputs(shape, distance)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    log_p, log_q = ((h @ wide[2].T).log_softmax(-1) for h in wide[:2])
    exact_loss = OMEGA * F.kl_div(log_q, log_p.detach(), log_target=True, reduction="batchmean")
    exact = torch.autograd.grad(exact_loss, wide[1])[0]
    errors = {"output's own rounding": exact.bfloat16()}
    for name, loss in (("eager", eager), ("ours", ours)):
        errors[name] = torch.autograd.grad(loss(*leaves, labels, None), leaves[1])[0]
    return {name: float((g.double() - exact).norm() / exact.norm()) for name, g in errors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape: a check that everything runs")
    parser.add_argument("--only", default=",".join(SHAPES), help="shapes, separated by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="consistency_loss_cpu", help="file name under bench/results/")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shapes = SHAPES | {"quick": QUICK}
    if args.memory_of:
        print(json.dumps(measure_memory(shapes[args.only], args.memory_of)))
        return
    chosen = ["quick"] if args.quick else args.only.split(",")
    if unknown := set(chosen) - set(shapes):
        parser.error(f"unknown shapes {sorted(unknown)}, known are {list(shapes)}")
    results: dict[str, Any] = {"machine": machine()}
    results["accuracy"] = {str(distance): accuracy(distance) for distance in (0.3, 0.05, 0.01)}
    print(f"accuracy: {results['accuracy']}", flush=True)
    for name in chosen:
        shape = shapes[name]
        rounds = 2 if args.quick else max(2, args.rounds * 32000 * 1024 // max(shape.v * shape.d, 32000 * 1024))
        results[name] = {"mm GFLOP/s": product_ceiling(shape), **times(shape, rounds)}
        memory = {variant: peak_memory(name, variant) for variant in ("eager", "compile", "ours")}
        peak = memory["eager"]["peak_MB"]
        results[name] |= {
            "memory": memory,
            "ours beyond gradients / eager": memory["ours"]["beyond_gradients_MB"] / peak,
        }
        print(f"{name}: {json.dumps(results[name], indent=1)}", flush=True)
        save("consistency_loss_quick" if args.quick else args.name, results)


if __name__ == "__main__":
    main()
