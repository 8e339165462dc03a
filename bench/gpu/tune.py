"""Times candidates for the tables of tiles: what the fastest are, for somebody to write them there.

    bench/gpu.sh --stages tune [--seconds 300] [--dry-run]

Writes tune_gpu.json to $OUT or bench/results/, of every shape the tile in the table and all candidates, the fastest first. They
are compiled in several processes, then timed in this one while nothing else runs.
"""

import argparse
import dataclasses
import functools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.bench_consistency_loss_gpu import hardware
from bench.gpu import dry_run, linear_argmax, paged_attention
from bench.gpu.case import difference
from bench.gpu.timing import Stopwatch
from bench.measure import RESULTS, written

COMPILING_SHARE = 0.6
"""Of the time: about four seconds for each candidate of each shape, in as many processes."""
ROUNDS = 3
Key = tuple[str, int]
"""Operation, and which of its shapes."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """An operation on one shape, run with whatever tile is given."""

    operation: str
    shape: str
    tile: Any
    """In the table."""
    candidates: tuple[Any, ...]
    run: Callable[[Any], object]


def keys(tiny: bool) -> list[Key]:
    """``tiny``: sizes for Triton's interpreter."""
    rows, works = ((1,), (0,)) if tiny else (linear_argmax.ROWS, (0, 1, 4))
    return [*(("linear_argmax", count) for count in rows), *(("paged_attention", index) for index in works)]


@functools.lru_cache(maxsize=1)  # inputs are large
def subject_of(key: Key, tiny: bool) -> Subject:
    operation, which = key
    device = torch.device("cpu" if tiny else "cuda")
    if operation == "linear_argmax":
        return of_linear_argmax(which, device, tiny)
    return of_paged_attention((paged_attention.TINY if tiny else paged_attention.WORK)[which], device, tiny)


def of_linear_argmax(rows: int, device: torch.device, tiny: bool) -> Subject:
    from engine.kernels.gpu import linear_argmax as module
    from engine.kernels.gpu.logits_tile import Tiles

    name = "tiny" if tiny else "gemma-2-9b"
    d, v, softcap = (32, 200, 5.0) if tiny else linear_argmax.SHAPES[name]
    dtype = torch.float32 if tiny else torch.bfloat16
    greedy = next(iter(linear_argmax.pair(name, rows, d, v, softcap, dtype, device)))
    width = min(128, max(16, 1 << (rows - 1).bit_length()))
    first = width < 128
    sizes = list(product((64, 128, 256), (64, 128), (4, 8), (3, 4, 5)))[: 2 if tiny else None]
    return Subject(
        "linear_argmax", greedy.shape, module.tiles(rows, d, dtype),
        tuple(Tiles(width, *size, first, 1 if first else 8) for size in sizes),
        functools.partial(with_tiles, module, greedy.variants["ours"]),
    )  # fmt: skip


def of_paged_attention(work: paged_attention.Work, device: torch.device, tiny: bool) -> Subject:
    from engine.kernels.gpu import attention_plan as module

    case = paged_attention.case(work, device)
    group, dtype = work.heads // work.kv_heads, torch.float32 if tiny else torch.bfloat16
    lines = group * (1 if dtype is torch.float32 else work.rows)
    table = module.tiles(module.chip_of(device).capability, dtype, work.head_dim, lines)
    sizes = product((64, 128) if lines > 16 else (16,), (32, 64, 128), (4, 8), (2, 3, 4), (1, 2, 3))
    return Subject(
        "paged_attention", work.name, table, tuple(module.Tiles(*size) for size in sizes)[: 2 if tiny else None],
        functools.partial(with_tiles, module, case.variants["ours"]),
    )  # fmt: skip


def with_tiles(module: Any, run: Callable[[], object], tile: Any) -> object:
    with mock.patch.object(module, "tiles", return_value=tile):
        return run()


def started(tiny: bool) -> None:
    """In every process that compiles."""
    if tiny:
        dry_run.prepare()


def compiled(key: Key, number: int, tiny: bool) -> str | None:
    """Runs a candidate once, so that Triton keeps it on disk; what it fails with."""
    subject = subject_of(key, tiny)
    try:
        subject.run(subject.candidates[number])
        if not tiny:
            torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None


def timed(subject: Subject, tile: Any, watch: Stopwatch, right: object) -> dict[str, Any]:
    entry: dict[str, Any] = {"tile": dataclasses.asdict(tile)}
    try:
        run = functools.partial(subject.run, tile)
        entry["difference"] = difference(run(), right)
        [seconds] = watch.interleaved({"": run}, ROUNDS).values()
        entry["median_seconds"] = statistics.median(seconds)
    except Exception as error:
        entry["error"] = f"{type(error).__name__}: {error}"[:200]
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=280, help="start nothing new after this")
    parser.add_argument("--jobs", type=int, help="processes that compile; each holds inputs, some gigabytes")
    parser.add_argument("--dry-run", action="store_true", help="two candidates of tiny shapes on a CPU")
    args = parser.parse_args()
    start = time.monotonic()
    tiny: bool = args.dry_run
    started(tiny)
    out = Path(os.environ.get("OUT") or RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"tune_gpu{'_dry_run' if tiny else ''}.json"
    # the first candidates of all shapes come first: the time may end before the last
    tasks = [(key, number) for key in keys(tiny) for number in range(len(subject_of(key, tiny).candidates))]
    tasks.sort(key=lambda task: task[1])
    errors = in_processes(tasks, tiny, args.jobs or min(8, os.cpu_count() or 1), start + COMPILING_SHARE * args.seconds)
    watch = Stopwatch(torch.device("cpu" if tiny else "cuda"))
    results: dict[str, Any] = {"machine": hardware()}
    failed = False
    for key in keys(tiny):
        subject = subject_of(key, tiny)
        right = subject.run(subject.tile)
        table = timed(subject, subject.tile, watch, right)
        candidates: list[dict[str, Any]] = []
        results.setdefault(subject.operation, {})[subject.shape] = {"table": table, "candidates": candidates}
        for number, tile in enumerate(subject.candidates):
            error = errors.get((key, number), "not compiled: no time")
            late = "not timed: no time" if time.monotonic() > start + args.seconds else None
            if error or late:
                candidates.append({"tile": dataclasses.asdict(tile), "error": error or late})
            else:
                candidates.append(timed(subject, tile, watch, right))
        candidates.sort(key=lambda entry: entry.get("median_seconds", float("inf")))
        written(path, results)
        failed |= "error" in table
        for name, entry in [("table", table), *(("", entry) for entry in candidates[:5])]:
            found = f"{1e6 * entry['median_seconds']:9.1f} us" if "median_seconds" in entry else entry["error"]
            print(f"{subject.operation:16} {subject.shape:40} {name:6} {found}  {entry['tile']}", flush=True)
    print(path)
    sys.exit(failed)


def in_processes(
    tasks: list[tuple[Key, int]], tiny: bool, jobs: int, deadline: float
) -> dict[tuple[Key, int], str | None]:
    """What became of every task that was done in time."""
    found: dict[tuple[Key, int], str | None] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), started, (tiny,)) as pool:
        waiting: dict[tuple[Key, int], Future[str | None]] = {
            (key, number): pool.submit(compiled, key, number, tiny) for key, number in tasks
        }
        for task, future in waiting.items():
            try:
                found[task] = future.result(max(0.0, deadline - time.monotonic()))
            except futures.TimeoutError:
                break
            except Exception as error:  # the process died
                found[task] = f"{type(error).__name__}: {error}"[:200]
        pool.shutdown(wait=True, cancel_futures=True)  # nothing else may run while candidates are timed
    return found


if __name__ == "__main__":
    main()
