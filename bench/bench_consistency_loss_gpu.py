"""The consistency loss on a GPU against eager, torch.compile, Liger and cut-cross-entropy.

    python -m bench.bench_consistency_loss_gpu [--rows 8192] [--rounds 7] [--seconds 300] [--dry-run]

Time and memory of loss and gradients of both hidden streams and W, bf16, the variants in turn in every round; every
figure beside six units of matrix product measured in the same run. ``--dry-run``: the same code on tiny shapes on a CPU
(with TRITON_INTERPRET=1 the Triton plans too). bench/gpu.sh runs it after the tests.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import RESULTS, machine
from engine.kernels.consistency_loss import consistency_loss

OMEGA = 1e3
SHAPES = {"gemma-2-9b": (256000, 3584, 30.0), "llama-3-8b": (128256, 4096, None)}
TINY = {"tiny": (300, 32, 30.0)}
DISTANCES = (0.3, 0.05, 0.01)
Variant = Callable[["Inputs"], None]


@dataclass(frozen=True)
class Inputs:
    """One batch: every target row has a label and teaches one draft row."""

    target: Tensor
    draft: Tensor
    weight: Tensor
    labels: Tensor
    pairs: Tensor
    softcap: float | None

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.target, self.draft, self.weight


def make(rows: int, v: int, d: int, softcap: float | None, device: str, distance: float = 0.3) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator, dtype=torch.float32)

    target = normal(rows, d)
    draft = target + distance * normal(rows, d)
    weight = torch.empty(v, d, device=device, dtype=torch.bfloat16)
    for part in weight.split(16384):
        part.copy_(normal(*part.shape) * 2 / d**0.5)
    hidden = [x.bfloat16().requires_grad_() for x in (target, draft)]
    labels = torch.randint(v, (rows,), device=device, generator=generator)
    return Inputs(hidden[0], hidden[1], weight.requires_grad_(), labels, torch.arange(rows, device=device), softcap)


def capped(z: Tensor, cap: float | None) -> Tensor:
    return cap * torch.tanh(z / cap) if cap else z


def plain_loss(
    target: Tensor, draft: Tensor, weight: Tensor, labels: Tensor, pairs: Tensor, softcap: float | None
) -> Tensor:
    """What a trainer writes: logits in the model's dtype, cast to float32 (float64 with float64 inputs) for the loss."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    teacher, student = (capped(F.linear(x, weight), softcap).to(wide) for x in (target, draft))
    ce = F.cross_entropy(teacher, labels)
    log_p = teacher.detach().log_softmax(-1)[pairs]
    return ce + OMEGA * F.kl_div(student.log_softmax(-1), log_p, reduction="batchmean", log_target=True)


def ours(plan: str) -> Variant:
    def run(x: Inputs) -> None:
        out = consistency_loss(
            x.target, x.draft, x.weight, x.labels, x.pairs, omega=OMEGA, softcap=x.softcap, plan=plan, impl="triton"
        )  # type: ignore[call-overload,unused-ignore]
        out.loss.backward()

    return run


def eager(x: Inputs) -> None:
    plain_loss(x.target, x.draft, x.weight, x.labels, x.pairs, x.softcap).backward()


def compiled() -> Variant:
    loss = torch.compile(plain_loss)

    def run(x: Inputs) -> None:
        loss(x.target, x.draft, x.weight, x.labels, x.pairs, x.softcap).backward()

    return run


def liger() -> Variant:
    """Fused linear cross entropy, and fused linear JSD at beta 0, which is the forward KL; the latter has no soft-cap."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    def run(x: Inputs) -> None:
        first = (x.target, x.weight, x.labels, None, None, -100, 0.0, 0.0, "mean", x.softcap)
        ce = LigerFusedLinearCrossEntropyFunction.apply(*first)
        ce = ce[0] if isinstance(ce, tuple) else ce
        teacher, weight = x.target.detach(), x.weight.detach()
        kl = LigerFusedLinearJSDFunction.apply(x.draft, x.weight, teacher, weight, None, 0.0, -100, 1.0)
        (ce + OMEGA * kl).backward()

    return run


def cut_cross_entropy() -> Variant:
    """The cross entropy alone."""
    from cut_cross_entropy import linear_cross_entropy

    def run(x: Inputs) -> None:
        linear_cross_entropy(x.target, x.weight, x.labels, softcap=x.softcap, impl="cce").backward()

    return run


def products(x: Inputs) -> None:
    """Six units: what any exact implementation multiplies, at the size that suits the library best."""
    with torch.no_grad():
        for hidden in (x.target, x.draft):
            z = hidden @ x.weight.T
            x.weight.grad, hidden.grad = z.T @ hidden, z @ x.weight


BUILDERS: dict[str, Callable[[], Variant]] = {
    "six products": lambda: products,
    "triton dense": lambda: ours("dense"),
    "triton recompute": lambda: ours("recompute"),
    "eager": lambda: eager,
    "torch.compile": compiled,
    "liger": liger,
    "cut-cross-entropy (CE only)": cut_cross_entropy,
}


def clear(x: Inputs) -> None:
    for leaf in x.leaves():
        leaf.grad = None


def empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def seconds_of(run: Variant, x: Inputs) -> float:
    """One call on a warm allocator; gradients of the call before are freed first."""
    clear(x)
    if not x.weight.is_cuda:
        start = time.perf_counter()
        run(x)
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run(x)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_of(run: Variant, x: Inputs) -> float:
    """Bytes allocated at the peak of a call beyond the inputs, its gradients included."""
    clear(x)
    if not x.weight.is_cuda:
        run(x)
        return 0.0
    empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(x)
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


def first_calls(x: Inputs, record: dict[str, Any], deadline: float) -> dict[str, Variant]:
    """Builds and compiles every variant; those that cannot run here are recorded with the reason."""
    able: dict[str, Variant] = {}
    for name, build in BUILDERS.items():
        record[name] = entry = {}
        if time.monotonic() > deadline:
            entry["error"] = "left out: no time"
            continue
        try:
            run = build()
            start = time.monotonic()
            seconds_of(run, x)
            entry["first_call_seconds"] = time.monotonic() - start
            entry["peak_bytes"] = peak_of(run, x)
            able[name] = run
        except Exception as error:  # a peer's failure, out of memory above all, is a result
            entry["error"] = f"{type(error).__name__}: {error}"[:400]
        clear(x)
        empty_cache()
        print(f"  {name}: {entry}", flush=True)
    return able


def timings(x: Inputs, able: dict[str, Variant], rounds: int, deadline: float) -> dict[str, list[float]]:
    """Every round times each variant once, after an untimed call that fills the allocator again."""
    seconds: dict[str, list[float]] = {name: [] for name in able}
    for _ in range(rounds):
        if time.monotonic() > deadline:
            break
        for name, run in able.items():
            seconds_of(run, x)
            seconds[name].append(seconds_of(run, x))
            clear(x)
            empty_cache()
    return seconds


def accuracy(rows: int, v: int, d: int, softcap: float | None, device: str) -> dict[str, Any]:
    """Relative error of the draft stream's gradient against float64, by the distance between the streams."""
    found: dict[str, Any] = {}
    for distance in DISTANCES:
        x = make(rows, v, d, softcap, device, distance)
        exact = [leaf.detach().double().requires_grad_() for leaf in x.leaves()]
        plain_loss(exact[0], exact[1], exact[2], x.labels, x.pairs, softcap).backward()
        reference = exact[1].grad
        assert reference is not None
        del exact
        # Liger's divergence knows no soft-cap: with one its gradient is that of another loss
        for name in ("triton dense", "triton recompute", "eager", *(["liger"] if softcap is None else [])):
            clear(x)
            try:
                BUILDERS[name]()(x)
                assert x.draft.grad is not None
                error: float | str = ((x.draft.grad.double() - reference).norm() / reference.norm()).item()
            except Exception as failure:  # as above
                error = f"{type(failure).__name__}: {failure}"[:400]
            found.setdefault(name, {})[str(distance)] = error
        empty_cache()
    return found


def summarise(record: dict[str, Any], seconds: dict[str, list[float]], units: float) -> None:
    """Medians and spread, TFLOP/s of the useful products, and the time relative to the six products of each round."""
    base = seconds.get("six products", [])
    for name, values in seconds.items():
        if not values:
            continue
        share = 0.5 if "CE only" in name else 1.0
        entry = record[name]
        entry["seconds"] = values
        entry["median_seconds"] = median = statistics.median(values)
        entry["tflops"] = share * 6 * units / median / 1e12
        ratios = [a / b for a, b in zip(values, base, strict=False)]
        entry["times_six_products"] = statistics.median(ratios) if ratios else None
        print(
            f"  {name:30} {1e3 * median:9.2f} ms ({1e3 * min(values):.2f} .. {1e3 * max(values):.2f})  "
            f"{entry['tflops']:7.1f} TFLOP/s  {entry['peak_bytes'] / 2**30:7.2f} GiB", flush=True,
        )  # fmt: skip


def hardware() -> dict[str, Any]:
    found = machine()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
        found["multiprocessors"] = properties.multi_processor_count
    for module in ("triton", "liger_kernel", "cut_cross_entropy"):
        try:
            found[module] = getattr(__import__(module), "__version__", "installed")
        except Exception as error:  # a peer may fail to import with this version of its dependencies
            found[module] = f"not usable: {error}"[:200]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="per stream")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=300, help="start nothing new after this")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU: does every path run?")
    args = parser.parse_args()
    start = time.monotonic()
    device, rows = ("cpu", 8) if args.dry_run else ("cuda", args.rows)
    shapes = TINY if args.dry_run else SHAPES
    out = Path(os.environ.get("OUT") or RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"consistency_loss_gpu{'_dry_run' if args.dry_run else ''}.json"
    results: dict[str, Any] = {"machine": hardware(), "rows_per_stream": rows, "dtype": "bfloat16", "omega": OMEGA}
    for i, (name, (v, d, softcap)) in enumerate(shapes.items()):
        results[name] = shape = {"vocabulary": v, "hidden": d, "softcap": softcap, "variants": {}}
        deadline = start + args.seconds * (i + 1) / len(shapes)
        print(f"== {name}: V={v} D={d} rows={rows} per stream", flush=True)
        shape["draft_gradient_error"] = accuracy(min(rows, 64), v, d, softcap, device)
        print(f"  draft gradient error: {shape['draft_gradient_error']}", flush=True)
        x = make(rows, v, d, softcap, device)
        able = first_calls(x, shape["variants"], deadline)
        seconds = timings(x, able, 1 if args.dry_run else args.rounds, deadline)
        summarise(shape["variants"], seconds, 2.0 * rows * v * d)
        path.write_text(json.dumps(results, indent=1) + "\n")
        del x
        empty_cache()
    print(path)


if __name__ == "__main__":
    main()
