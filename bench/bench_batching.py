"""Continuous batching against static batches on drafts of uneven length.

python -m bench.bench_batching [--drafts FILE.jsonl] [--rows N] [--rounds N] [--name batching]

Same engine, weights, requests, kernels and limit on the batch. Static: as many requests as the limit, the next ones when all of
them are done, in the order of the file and sorted by the draft's length, which is what a user of static batches would do.
Continuous: a request enters when another one ends. The variants take turns; their answers must be equal. Writes
bench/results/batching.json.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from bench.bench_refine import Rows, read_drafts
from bench.measure import interleaved, machine, medians, ratio, save
from engine import RefineOptions, Refiner, Result
from engine.options import DEFAULT_CONDITION

BATCHES = (8, 32)
OPTIONS = RefineOptions(max_new_tokens=256, condition=DEFAULT_CONDITION)


def static(refiner: Refiner, rows: Rows, batch: int) -> list[Result]:
    return [result for at in range(0, len(rows), batch) for result in refiner.refine(rows[at : at + batch], OPTIONS)]


def measure(rows: Rows, batch: int, rounds: int) -> dict[str, Any]:
    by_length = sorted(rows, key=lambda row: len(row["draft"]))
    with Refiner.from_pretrained(max_batch_size=batch) as refiner:
        answers = refiner.refine(rows, OPTIONS)
        assert [r.token_ids for r in static(refiner, rows, batch)] == [r.token_ids for r in answers]
        seconds = interleaved(
            {
                "continuous": lambda: refiner.refine(rows, OPTIONS),
                "static": lambda: static(refiner, rows, batch),
                "static, sorted": lambda: static(refiner, by_length, batch),
            },
            rounds,
        )
    lengths = [len(answer.token_ids) for answer in answers]
    return {
        "rows": len(rows),
        "answer tokens": {"min": min(lengths), "median": statistics.median(lengths), "max": max(lengths)},
        "steps": {"min": min(a.steps for a in answers), "max": max(a.steps for a in answers)},
        "answers/s": {name: len(rows) / value for name, value in medians(seconds).items()},
        "static / continuous": ratio(seconds, "static", "continuous"),
        "static, sorted / continuous": ratio(seconds, "static, sorted", "continuous"),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafts", type=Path, default=Path(__file__).parent / "demo" / "drafts.jsonl")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the kernels")
    parser.add_argument("--name", default="batching", help="file name under bench/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = read_drafts(args.drafts, args.rows)
    results: dict[str, Any] = {
        "machine": machine(),
        "drafts": args.drafts.name,
        "max_new_tokens": OPTIONS.max_new_tokens,
    }
    for batch in BATCHES:
        results[f"batch {batch}"] = measure(rows, batch, args.rounds)
        print(f"batch {batch}:", {k: v for k, v in results[f"batch {batch}"].items() if k != "seconds"}, flush=True)
    print(save(args.name, results))


if __name__ == "__main__":
    main()
