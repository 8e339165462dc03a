"""Every kernel of the refine path against eager PyTorch, torch.compile and the best library there is."""

import importlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu.case import Case
from bench.gpu.timing import Stopwatch, spread
from engine.roofline import Roofline

OPERATIONS = (
    "paged_attention",
    "linear_argmax",
    "rms_norm",
    "rope_kv_write",
    "gated_activation",
    "jacobi_accept",
)
"""A module of each is here, with its ``cases``; those of the most important shapes come first."""
Results = dict[str, list[dict[str, Any]]]


def measure(watch: Stopwatch, ceilings: Roofline, *, tiny: bool, deadline: float) -> Iterator[Results]:
    """Of every operation its cases, yielded after each as far as they are known; a failure stops only its operation."""
    found: Results = {}
    for number, operation in enumerate(OPERATIONS):
        # what an operation leaves of its share goes to those behind it
        share = time.monotonic() + (deadline - time.monotonic()) / (len(OPERATIONS) - number)
        records: list[dict[str, Any]] = []
        found[operation] = records
        try:
            cases: Iterable[Case] = importlib.import_module(f"bench.gpu.{operation}").cases(watch.device, tiny=tiny)
            for case in cases:
                if time.monotonic() > share:
                    records.append({"shape": case.shape, "error": "left out, and those behind it: no time"})
                    break
                # each shape is compiled anew, which PyTorch would give up after eight
                torch.compiler.reset()
                records.append(one(case, watch, ceilings, 1 if tiny else 7))
                yield found
        except Exception as error:
            records.append({"error": f"{type(error).__name__}: {error}"[:400]})
            print(f"{operation}: {records[-1]['error']}", flush=True)
        yield found


def one(case: Case, watch: Stopwatch, ceilings: Roofline, rounds: int) -> dict[str, Any]:
    """Time of every variant that runs, how far it is from the floor, and how far its output is from ours."""
    record: dict[str, Any] = {"operation": case.operation, "shape": case.shape, "bytes": case.bytes}
    record |= {"flops": case.flops, "variants": {}}
    record["floor_seconds"] = floor = ceilings.floor(case.bytes, case.flops)
    able = {}
    ours: list[Tensor] = []
    for name, call in sorted(case.variants.items(), key=lambda item: item[0] != "ours"):
        record["variants"][name] = entry = {}
        try:
            start = time.monotonic()
            output = call()
            entry["first_call_seconds"] = time.monotonic() - start
            if name == "ours":  # variants may write where it did
                ours = [part.clone() for part in _tensors(output)]
            entry["difference_from_ours"] = difference(output, ours)
            able[name] = call
        except Exception as error:  # a peer that cannot do this shape is a result
            entry["error"] = f"{type(error).__name__}: {error}"[:400]
    for name, values in watch.interleaved(able, rounds).items():
        entry = record["variants"][name]
        median = spread(values)["median"]
        entry |= {
            "seconds": values,
            "median_seconds": median,
            "gigabytes_per_second": case.bytes / median / 1e9,
            "tflops": case.flops / median / 1e12,
            "share_of_floor": floor / median,
        }
        print(
            f"{case.operation:18} {case.shape:44} {name:24} {1e6 * median:9.1f} us  {entry['gigabytes_per_second']:7.0f} GB/s "
            f"{entry['tflops']:7.1f} TFLOP/s  {100 * entry['share_of_floor']:5.1f}% of the floor's speed",
            flush=True,
        )
    return record


def difference(output: object, ours: object) -> float | None:
    """Largest relative difference (2-norm) of two outputs, share of unequal entries for integers; None: not comparable."""
    pairs = list(zip(_tensors(output), _tensors(ours), strict=False))
    if not pairs or any(a.shape != b.shape for a, b in pairs):
        return None
    worst = 0.0
    for a, b in pairs:
        if a.is_floating_point():
            worst = max(worst, ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item())
        else:
            worst = max(worst, (a != b).double().mean().item() if a.numel() else 0.0)
    return worst


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [part for part in value if isinstance(part, Tensor)] if isinstance(value, tuple | list) else []
