"""Every kernel of the refine path against eager PyTorch, torch.compile and the best library there is."""

import importlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu.case import Case, difference, tensors
from bench.gpu.restart import DeviceLost, lost
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


def measure(
    watch: Stopwatch, ceilings: Roofline, *, tiny: bool, deadline: float, before: Results | None = None
) -> Iterator[Results]:
    """Of every operation its cases, yielded after each as far as they are known; a failure stops only its operation.

    ``before``: what a process found that could not go on; its operations are not measured again.
    """
    found: Results = dict(before or {})
    waiting = [operation for operation in OPERATIONS if operation not in found]
    for number, operation in enumerate(waiting):
        # what an operation leaves of its share goes to those behind it
        share = time.monotonic() + (deadline - time.monotonic()) / (len(waiting) - number)
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
                if lost(watch.device):
                    break
        except Exception as error:
            records.append({"error": f"{type(error).__name__}: {error}"[:400]})
            print(f"{operation}: {records[-1]['error']}", flush=True)
        yield found
        if lost(watch.device):
            raise DeviceLost


def one(case: Case, watch: Stopwatch, ceilings: Roofline, rounds: int) -> dict[str, Any]:
    """Time of every variant that runs and how far that is from the floor; how far ours is from what is right."""
    record: dict[str, Any] = {"operation": case.operation, "shape": case.shape, "bytes": case.bytes}
    record |= {"flops": case.flops, "variants": {}}
    record["floor_seconds"] = floor = ceilings.floor(case.bytes, case.flops)
    able = {}
    ours: list[Tensor] = []
    print(f"{case.operation:18} {case.shape}", flush=True)
    for name, call in sorted(case.variants.items(), key=lambda item: item[0] != "ours"):
        record["variants"][name] = entry = {}
        try:
            start = time.monotonic()
            output = call()
            entry["first_call_seconds"] = time.monotonic() - start
            if name == "ours":  # variants may write where it did
                ours = [part.clone() for part in tensors(output)]
                entry |= checked(case, ours)
            elif ours:
                entry["difference_from_ours"] = difference(output, ours)
            able[name] = call
        except Exception as error:  # a peer that cannot do this shape is a result
            entry["error"] = f"{type(error).__name__}: {error}"[:400]
            if lost(watch.device):
                return record
        if "error" in entry:
            print(f"{'':18} {name}: {entry['error']}", flush=True)
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
        off = f"  off by {entry['off_by']:.1e}, at most {case.bound:.1e}" if name == "ours" else ""
        print(
            f"{'':18} {name:24} {1e6 * median:9.1f} us  {entry['gigabytes_per_second']:7.0f} GB/s "
            f"{entry['tflops']:7.1f} TFLOP/s  {100 * entry['share_of_floor']:5.1f}% of the floor's speed{off}",
            flush=True,
        )
    return record


def checked(case: Case, output: object) -> dict[str, Any]:
    """How far ours is off, and an error if that is too far."""
    off = case.error(output)
    found: dict[str, Any] = {"off_by": off, "may_be_off_by": case.bound}
    if not off <= case.bound:  # NaN too
        found["error"] = f"wrong: off by {off:.3g}, at most {case.bound:.3g} is right"
    return found


def rated(results: Results, ceilings: Roofline) -> None:
    """Figures that depend on the ceilings, by these."""
    for record in (record for records in results.values() for record in records if "variants" in record):
        record["floor_seconds"] = ceilings.floor(record["bytes"], record["flops"])
        for entry in record["variants"].values():
            if "median_seconds" in entry:
                entry["share_of_floor"] = record["floor_seconds"] / entry["median_seconds"]
