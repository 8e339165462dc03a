"""The consistency loss on a GPU against eager, torch.compile, Liger and cut-cross-entropy.

    python -m bench.bench_consistency_loss_gpu [--rows 8192] [--rounds 7] [--seconds 300] [--states FILE] [--dry-run]

Time and memory of loss and gradients of both hidden streams and W, bf16, the variants in turn in every round; every
figure beside six units of matrix product measured in the same run. Then their gradients beside float64; exit status 1 if one of
ours fails, or its gradients are further off than is right. ``--states``: a safetensors file with target and draft
[n, d], weight [v, d] and labels [n] of a trained model, measured like the random inputs: they are what the sparse plan
is for, which leaves nothing out of random ones. ``--dry-run``: the same code on tiny shapes on a CPU
(with TRITON_INTERPRET=1 the Triton plans too). bench/gpu.sh runs it after the tests.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.consistency_loss_gpu_variants import BUILDERS, OURS, SPARSE_EPS, Variant
from bench.consistency_loss_inputs import OMEGA, Inputs, load, make, plain_loss
from bench.gpu.dry_run import prepare
from bench.gpu.restart import DeviceLost, lost, start_over
from bench.measure import RESULTS, machine, written
from engine.kernels.consistency_loss.problem import Needs

SHAPES = {"gemma-2-9b": (256000, 3584, 30.0), "llama-3-8b": (128256, 4096, None)}
TINY = {"tiny": (300, 32, 30.0)}
DISTANCES = (0.3, 0.05, 0.01)
MOST_OFF = {"triton dense": 2e-3, "triton recompute": 2e-3, "triton sparse": 2e-2}
"""Most that gradients in bfloat16 may be off, relative to the exact one's norm and before its own rounding; the last leaves
out what is small."""
TIMED_SHARE = 0.8
"""Of a batch's time; what is left is for its gradients."""
NO_TIME = "left out: no time"
Save = Callable[[], None]


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


def first_calls(x: Inputs, record: dict[str, Any], deadline: float, save: Save) -> dict[str, Variant]:
    """Builds and compiles every variant; those that cannot run here are recorded with the reason.

    Not again those that have one in ``record``.
    """
    able: dict[str, Variant] = {}
    for name, build in BUILDERS.items():
        entry = record.setdefault(name, {})
        if "error" in entry:
            continue
        if time.monotonic() > deadline:
            entry["error"] = NO_TIME
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
            stop_if_lost(x, save)
        clear(x)
        empty_cache()
        print(f"  {name}: {entry}", flush=True)
        save()
    return able


def stop_if_lost(x: Inputs, save: Save) -> None:
    save()
    if lost(x.weight.device):
        raise DeviceLost


def timings(
    x: Inputs, able: dict[str, Variant], record: dict[str, Any], rounds: int, deadline: float, save: Save
) -> None:
    """Every round times each variant once, after an untimed call that fills the allocator again; one round in any case."""
    rows, (v, d) = x.labels.numel(), x.weight.shape
    seconds: dict[str, list[float]] = {name: [] for name in able}
    for number in range(rounds):
        if number and time.monotonic() > deadline:
            break
        for name, run in list(able.items()):
            try:
                seconds_of(run, x)
                seconds[name].append(seconds_of(run, x))
            except Exception as error:  # as above
                record[name]["error"] = f"{type(error).__name__}: {error}"[:400]
                del able[name]
                stop_if_lost(x, save)
            clear(x)
            empty_cache()
            summarise(record, seconds, 2.0 * rows * v * d)
            save()


def density(x: Inputs) -> dict[str, float | str]:
    """What the sparse plan multiplies of this batch: shares for the two products, and units in all."""
    try:
        from engine.kernels.consistency_loss.triton_sparse import with_density

        kept = with_density(x.problem(SPARSE_EPS), Needs(True, True, True, False, False))[1]
        found = {
            "filter_eps": SPARSE_EPS,
            "hidden": float(kept.hidden),
            "weight": float(kept.weight),
            "units": kept.units(),
        }
    except Exception as error:  # a result, as with the variants
        return {"error": f"{type(error).__name__}: {error}"[:400]}
    empty_cache()
    return {**found}


def gradient_errors(x: Inputs, found: dict[str, Any], deadline: float, save: Save) -> None:
    """Relative errors of every variant's gradients against float64, and what is wrong with ours; not of those in ``found``."""
    # Liger's divergence knows no soft-cap: with one its gradient is that of another loss
    names = [name for name in (*OURS, "eager", *(["liger"] if x.softcap is None else [])) if name not in found]
    if time.monotonic() > deadline:
        found |= {name: {"error": NO_TIME} for name in names}
        return
    exact = [leaf.detach().double().requires_grad_() for leaf in x.leaves()]
    plain_loss(exact[0], exact[1], exact[2], x.labels, x.pairs, x.softcap).backward()
    references = [leaf.grad for leaf in exact]
    del exact
    for name in names:
        found[name] = entry = {}
        if time.monotonic() > deadline:
            entry["error"] = NO_TIME
            continue
        clear(x)
        try:
            BUILDERS[name]()(x)
            for part, leaf, reference in zip(("target", "draft", "weight"), x.leaves(), references, strict=True):
                if leaf.grad is not None and reference is not None:
                    entry[part] = ((leaf.grad.double() - reference).norm() / reference.norm()).item()
                    rounded = (reference.to(leaf.dtype).double() - reference).norm()
                    most = MOST_OFF.get(name, float("inf")) + (rounded / reference.norm()).item()
                    if not entry[part] <= most:  # NaN too
                        entry["error"] = (
                            f"wrong: the gradient of {part} is off by {entry[part]:.3g}, {most:.3g} is right"
                        )
                elif name in OURS:
                    entry["error"] = f"wrong: there is no gradient of {part}"
        except Exception as error:  # as above
            entry["error"] = f"{type(error).__name__}: {error}"[:400]
            stop_if_lost(x, save)
        print(f"    {name}: {entry}", flush=True)
        save()
    clear(x)
    empty_cache()


def measured(
    x: Inputs,
    smaller: dict[str, Callable[[], Inputs]],
    rounds: int,
    deadline: float,
    record: dict[str, Any],
    save: Save,
) -> None:
    """Everything of one batch into ``record``; ``smaller`` makes those whose gradients are compared with float64.

    ``record`` may hold what a process found that could not go on: what failed there is not tried again.
    """
    v, d = x.weight.shape
    rows = x.labels.numel()
    print(f"  V={v} D={d} rows={rows} per stream", flush=True)
    record |= {"vocabulary": v, "hidden": d, "softcap": x.softcap, "rows": rows}
    variants = record.setdefault("variants", {})
    now = time.monotonic()
    timed_until = now + TIMED_SHARE * (deadline - now)
    able = first_calls(x, variants, timed_until, save)
    timings(x, able, variants, rounds, timed_until, save)
    for name, entry in variants.items():
        if "median_seconds" in entry:
            print(line(name, entry), flush=True)
    if "density" not in record:
        record["density"] = density(x)
        stop_if_lost(x, save)
    print(f"  density: {record['density']}", flush=True)
    for name, small in smaller.items():
        print(f"  gradients, {name}", flush=True)
        found = record.setdefault("gradient_errors", {}).setdefault(name, {})
        gradient_errors(small(), found, deadline, save)


def errors_of_ours(results: dict[str, Any]) -> list[str]:
    """A line each; among them what no time was left for."""
    lines = []
    for name, record in results.items():
        if not isinstance(record, dict) or "variants" not in record:
            continue
        parts = {"": record["variants"], "density, ": {OURS[2]: record.get("density", {})}}
        parts |= {f"gradients, {of}, ": found for of, found in record.get("gradient_errors", {}).items()}
        for of, found in parts.items():
            for variant in OURS:
                if "error" in found.get(variant, {}):
                    lines.append(f"{name}, {of}{variant}: {found[variant]['error']}")
    return lines


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


def line(name: str, entry: dict[str, Any]) -> str:
    values = entry["seconds"]
    return (
        f"  {name:30} {1e3 * entry['median_seconds']:9.2f} ms ({1e3 * min(values):.2f} .. {1e3 * max(values):.2f})  "
        f"{entry['tflops']:7.1f} TFLOP/s  {entry['peak_bytes'] / 2**30:7.2f} GiB"
    )


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
    parser.add_argument(
        "--states", type=Path, help="safetensors with target, draft, weight and labels of a trained model"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU: does every path run?")
    parser.add_argument("--go-on", action="store_true", help="with the results there are, without what failed in them")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if args.dry_run:
        prepare()
    start = time.monotonic()
    device, rows, few = ("cpu", 8, 8) if args.dry_run else ("cuda", args.rows, 64)
    out = Path(os.environ.get("OUT") or RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"consistency_loss_gpu{'_dry_run' if args.dry_run else ''}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if args.go_on and path.exists() else {}
    results |= {"machine": hardware(), "dtype": "bfloat16", "omega": OMEGA}

    def save() -> None:
        written(path, results)

    shapes = list((TINY if args.dry_run else SHAPES).items())
    names = [name for name, _ in shapes] + (["trained model"] if args.states else [])
    for i, name in enumerate(names):
        print(f"== {name}", flush=True)
        if i < len(shapes):
            v, d, softcap = shapes[i][1]
            smaller = {f"distance {x}": partial(make, few, v, d, softcap, device, x) for x in DISTANCES}
            batch = make(rows, v, d, softcap, device)
        else:
            batch = load(args.states, rows, device)
            smaller = {"its first rows": partial(batch.first, 8 * few)}
        deadline = start + args.seconds * (i + 1) / len(names)
        try:
            rounds = 1 if args.dry_run else args.rounds
            measured(batch, smaller, rounds, deadline, results.setdefault(name, {}), save)
        except DeviceLost:
            left = start + args.seconds - time.monotonic()
            start_over("bench.bench_consistency_loss_gpu", "--seconds", f"{left:.0f}", "--go-on")
        save()
        del batch, smaller
        empty_cache()
    print(path)
    errors = errors_of_ours(results)
    print("".join(f"{error}\n" for error in errors), end="")
    sys.exit(any(not error.endswith(NO_TIME) for error in errors))


if __name__ == "__main__":
    main()
