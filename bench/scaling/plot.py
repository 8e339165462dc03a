"""All curves as one picture of small multiples.

python -m bench.scaling.plot [scaling.json]
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.measure import RESULTS

COLUMNS = 4
COLOURS = {"engine": "C0", "eager": "C1", "sdpa": "C1", "token by token": "C2", "public script": "C3", "generate": "C1"}


def plot(results: dict[str, Any], path: Path) -> None:
    """Medians with least and most over the rounds, both axes logarithmic; the legends have the exponents."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = results["curves"]
    rows = -(-len(curves) // COLUMNS)
    figure, axes = pyplot.subplots(
        rows, COLUMNS, figsize=(4 * COLUMNS, 3.2 * rows), squeeze=False, layout="constrained"
    )
    for axis, curve in zip(axes.flat, curves, strict=False):
        for name, rounds in curve["values"].items():
            middle = [statistics.median(values) for values in rounds]
            spread = [[m - min(v) for m, v in zip(middle, rounds, strict=True)],
                      [max(v) - m for m, v in zip(middle, rounds, strict=True)]]  # fmt: skip
            label = f"{name}: {curve['exponents'][name]['exponent']:.2f}"
            axis.errorbar(curve["sizes"], middle, spread, marker="o", ms=3, capsize=2, color=COLOURS[name], label=label)
        axis.set(xscale="log", yscale="log", xlabel=curve["x"], ylabel=curve["unit"], title=curve["name"])
        axis.set_xticks(curve["sizes"], [f"{size:,}" for size in curve["sizes"]], rotation=30, fontsize=7)
        axis.minorticks_off()
        axis.tick_params(axis="y", labelsize=7)
        axis.legend(fontsize=7, title="exponents", title_fontsize=7)
    for unused in axes.flat[len(curves) :]:
        unused.remove()
    figure.savefig(path, dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "scaling.json"
    plot(json.loads(source.read_text()), source.with_suffix(".png"))


if __name__ == "__main__":
    main()
