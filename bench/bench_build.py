"""What ``python -m engine.trajectories build`` keeps in memory of its prompts.

python -m bench.bench_build [--prompts 100000,200000,400000] [--characters 200]

Every number of prompts is read in a process of its own. Writes bench/results/build.json.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench.measure import machine, save
from bench.scaling.memory import status
from engine.job.source import Source
from engine.trajectories.sources import Collection

ROUNDS = 3


def write_prompts(path: Path, count: int, characters: int) -> None:
    """Different prompts of one length each, as rows of ``prompt``."""
    letters = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            text = f"{number} " + "".join(letters.choices("etaoin shrdlu", k=characters))
            file.write(json.dumps({"prompt": text[:characters]}) + "\n")


def kept(path: Path) -> float:
    """Bytes more that the process holds once the prompts are collected, as a build does before it asks a model."""
    source = Source.open(str(path))
    before = status("VmRSS")
    collection = Collection()
    collection.add_file(source)
    rows = collection.finished(None, 0)
    assert not collection.bad
    assert rows
    return (status("VmRSS") - before) * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default="100000,200000,400000", help="numbers of prompts")
    parser.add_argument("--characters", type=int, default=200, help="of a prompt")
    args = parser.parse_args()
    counts = [int(count) for count in args.prompts.split(",")]
    results: dict[str, Any] = {"machine": machine(), "characters": args.characters, "prompts": counts, "bytes": []}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompts.jsonl")
        for count in counts:
            write_prompts(path, count, args.characters)
            with context.Pool(1, maxtasksperchild=1) as pool:
                results["bytes"].append(pool.map(kept, [path] * ROUNDS, chunksize=1))
            print(count, results["bytes"][-1], flush=True)
    totals = [statistics.median(rounds) for rounds in results["bytes"]]
    results["bytes_per_prompt"] = statistics.linear_regression(counts, totals).slope
    save("build", results)
    print(f"{results['bytes_per_prompt']:.0f} bytes a prompt of {args.characters} characters")


if __name__ == "__main__":
    main()
