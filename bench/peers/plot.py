"""Draws bench/results/peers.png from peers.json: reward against latency, the paper's Figure 1 at our scale."""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.measure import RESULTS
from bench.peers import figures
from bench.peers.catalogue import ALIGNER, BASE, CONVERGED, CORRECTOR, REFINER, REFINER_BEST_OF, reference
from bench.peers.figures import Results, percentile
from bench.peers.table import BROKEN
from engine.evaluate.statistics import FEWEST


def lines(results: Results) -> dict[str, list[str]]:
    """Methods that differ in one number are joined, the others stand alone; those of equal answers are one method here."""
    methods = list(results["methods"])
    steps = [name for name in methods if name.startswith("DiffPO") and "step" in name]
    found = {
        "base": [BASE],
        "best of n": [name for name in methods if name.startswith("best of")],
        **{name: [name] for name in methods if name.startswith("ARGS")},
        figures.label(results, ALIGNER): [CORRECTOR],
        "refiner alone": [REFINER],
        REFINER_BEST_OF: [REFINER_BEST_OF],
        "DiffPO, by steps": [*steps, CONVERGED],
        "DiffPO, public loop": ["DiffPO, public loop"],
    }
    kept = {label: [name for name in names if name in methods] for label, names in found.items()}
    return {label: names for label, names in kept.items() if names}


def rewards(results: Results, name: str) -> dict[int, float]:
    """Of a method by prompt; where it gives the tokens of another, of that one, which has answered more prompts."""
    return figures.scores(results, reference(name) or name)


def draw(results: Results, batch: str, panel: Any) -> None:
    """Medians and quartiles of the CPU seconds of a batch; mean rewards with 95% intervals. Broken text is hollow, and no part
    of a curve."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for number, (label, names) in enumerate(lines(results).items()):
        shown = [(name, found) for name in names if (found := figures.columns(results, name, batch)) is not None]
        shown = [(name, found) for name, found in shown if len(rewards(results, name)) >= FEWEST]
        if not shown:
            continue
        seconds = [found["cpu"] for _, found in shown]
        means = [figures.mean(rewards(results, name)) for name, _ in shown]
        x, y = [percentile(values, 50) for values in seconds], [one.mean for one in means]
        across = [[at - percentile(values, 25) for at, values in zip(x, seconds, strict=True)],
                  [percentile(values, 75) - at for at, values in zip(x, seconds, strict=True)]]  # fmt: skip
        up = [[one.mean - one.low for one in means], [one.high - one.mean for one in means]]
        style: dict[str, Any] = {"color": f"C{number}", "markersize": 4, "elinewidth": 0.7}
        hollow = [figures.text_broken(results, name) for name, _ in shown]
        for broken, form in ((False, {"fmt": "o-"}), (True, {"fmt": "o", "markerfacecolor": "none"})):
            at = [place for place, value in enumerate(hollow) if value == broken]
            if at:
                some = [[values[place] for place in at] for values in (x, y, *across, *up)]
                named = f"{label} ({BROKEN})" if broken else label
                panel.errorbar(*some[:2], xerr=some[2:4], yerr=some[4:], label=named, **style, **form)
        for (name, _), place in zip(shown, zip(x, y, strict=True), strict=True):
            if len(shown) > 1:
                panel.annotate(
                    name.split(", ")[-1].removeprefix("best of ").split()[0],
                    place,
                    fontsize=7,
                    textcoords="offset points",
                    xytext=(3, 3),
                )
    panel.set(title=batch, xlabel="CPU seconds of a batch, drafts included, median", xscale="log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.tick_params(axis="x", which="both", labelsize=7)
    panel.grid(alpha=0.3, which="both")


def plot(results: Results, path: Path) -> None:
    """Writes a PNG with a panel per batch size."""
    from matplotlib.figure import Figure

    sizes = figures.batches(results)
    figure = Figure(figsize=(5 * len(sizes), 4.5), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for batch, panel in zip(sizes, panels, strict=True):
        draw(results, batch, panel)
    panels[0].set_ylabel("reward, mean with 95% interval")
    found = {}  # a method may be missing at a batch size
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "peers.json")
    args = parser.parse_args()
    if not find_spec("matplotlib"):
        print("no plot: matplotlib is not installed (pip install 'diffpo-engine[plot]')")
        return
    plot(json.loads(args.results.read_text()), args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
