"""Joins results of several runs of bench.peers on the same settings, such as one for every batch size.

python -m bench.peers.join RUN.json RUN.json --out bench/results/peers.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bench.measure import RESULTS
from bench.peers.figures import Results
from bench.reproduction.measure import dump


def join(runs: list[Results]) -> Results:
    """The batches of all runs; ``machine`` is the first run's, ``machines`` holds all. Raises ValueError where they differ in
    their settings, development prompts among them, in threads or in cpu: that would compare what cannot be compared."""
    first, *others = runs
    joined: Results = json.loads(json.dumps(first))
    for other in others:
        if other["settings"] != first["settings"]:
            raise ValueError(f"runs must have the same settings, got {first['settings']} and {other['settings']}")
        for name in ("threads", "cpu"):
            ours, theirs = (run["machine"].get(name) for run in (first, other))
            if ours != theirs:
                raise ValueError(f"runs must have the same {name}, got {ours} and {theirs}")
        joined["left_out"] += other["left_out"]
        for method, found in other["methods"].items():
            for batch, columns in found.items():
                into = joined["methods"].setdefault(method, {}).setdefault(batch, {name: [] for name in columns})
                before = len(joined["loads"].get(batch, []))
                for name, values in columns.items():
                    into[name] += [value + before for value in values] if name == "turn" else values
        for batch, loads in other["loads"].items():
            joined["loads"].setdefault(batch, []).extend(loads)
    machines: list[Any] = [run["machine"] for run in runs]
    return joined | {"machines": machines}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--note", help="what is to be known of the runs, in place of the first one's")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json")
    args = parser.parse_args()
    joined = join([json.loads(path.read_text()) for path in args.runs])
    args.out.write_text(dump(joined | ({"note": args.note} if args.note else {})))


if __name__ == "__main__":
    main()
