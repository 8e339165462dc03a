"""Draws the loss curves in bench/results/reproduction.json: both terms of every run, over its steps."""

import argparse
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.measure import RESULTS

SMOOTHED = 10
"""Log lines that a point of a curve is the mean of."""


def smooth(values: Sequence[float], over: int = SMOOTHED) -> list[float]:
    """Running means of up to ``over`` values, each of those up to and including its place."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - over) : i + 1] for i in range(len(values)))]


def plot(runs: dict[str, Any], path: Path) -> None:
    """Writes a PNG with one panel per term."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    titles = {"ar": "cross entropy of the best response", "consistency": "consistency loss, without omega"}
    for panel, (term, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for number, (name, run) in enumerate(runs.items()):  # by number, so that a run has one colour in both panels
            curve = run.get("curve")
            if curve and any(curve[term]):
                panel.plot(curve["step"], smooth(curve[term]), f"C{number}", label=name)
        panel.set(title=title, xlabel="optimiser step", ylabel="nats per token")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "reproduction.json")
    parser.add_argument("--out", type=Path, default=RESULTS / "reproduction_loss.png")
    args = parser.parse_args()
    if not find_spec("matplotlib"):
        print("no plot: matplotlib is not installed (pip install 'diffpo-engine[plot]')")
        return
    plot(json.loads(args.results.read_text())["runs"], args.out)


if __name__ == "__main__":
    main()
