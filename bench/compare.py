"""Whether one run of the benchmarks is slower or faster than another beyond noise.

    python -m bench.compare OLD.json NEW.json [--again OLD2.json] [--out report.md] [--any-machine]

Both are files of ``python -m bench.suite``. The figure is new / old: of the medians over passes of each pass's median time.
"slower" or "faster" is said only if both hold:

- the 99 % bootstrap interval of that ratio leaves 1 out; drawn again are passes, and rounds within them, since rounds of
  one process are no independent trials;
- the ratio is further from 1 than the floor, which is what the machine does to unchanged code. Every run holds such an A/A
  comparison, its odd passes against its even ones: the floor is the 99 % quantile of these differences over all
  benchmarks, at least 1 %, and for each benchmark at least its own. Passes of one run are minutes apart; ``--again`` takes
  a second run of the old code at another time, whose differences to the first count as well.

Runs of different hardware, threads or kernels are refused. Exit status: 0 nothing is slower, 1 something is, 2 not comparable.
For plain tables side by side: ``pytest-benchmark compare OLD.json NEW.json``.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DRAWS = 2000
LEVEL = 0.99
FLOOR_QUANTILE = 0.99
LEAST_FLOOR = 0.01
HARDWARE = ("cpu", "cores", "threads", "kernels")
Passes = list[list[float]]
"""Seconds of every round, by pass."""
Run = dict[str, Any]


class NotComparable(ValueError):
    """The two files say nothing about each other."""


@dataclass(frozen=True)
class Change:
    """One benchmark in both runs."""

    name: str
    old: float
    new: float
    ratio: float
    low: float
    high: float
    floor: float

    @property
    def verdict(self) -> str:
        if self.low > 1 and self.ratio > 1 + self.floor:
            return "slower"
        if self.high < 1 and 1 / self.ratio > 1 + self.floor:
            return "faster"
        return "no difference beyond noise"


def median(passes: Passes) -> float:
    """Over passes, of each pass's median."""
    return float(np.median([np.median(rounds) for rounds in passes]))


def resampled(passes: Passes, random: np.random.Generator) -> np.ndarray:
    """``median`` [DRAWS] of passes drawn with replacement, and of rounds drawn within each."""
    by_pass = []
    for rounds in passes:
        drawn = random.integers(len(rounds), size=(DRAWS, len(rounds)))
        by_pass.append(np.median(np.asarray(rounds)[drawn], axis=1))
    chosen = random.integers(len(passes), size=(DRAWS, len(passes)))
    return np.median(np.stack(by_pass, axis=1)[np.arange(DRAWS)[:, None], chosen], axis=1)


def interval(old: Passes, new: Passes) -> tuple[float, float]:
    """Bounds of new / old; bootstrap percentiles (Efron & Tibshirani 1993, chapter 13)."""
    random = np.random.default_rng(0)
    low, high = np.quantile(resampled(new, random) / resampled(old, random), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def own_noise(passes: Passes) -> float:
    """|log ratio| of the odd passes to the even ones."""
    return abs(math.log(median(passes[1::2]) / median(passes[::2])))


def benchmarks(run: Run) -> dict[str, Passes]:
    """Rounds of every benchmark by its name. Raises NotComparable for a file without passes."""
    found = {b["fullname"]: b["extra_info"].get("passes", []) for b in run.get("benchmarks", [])}
    if not found or any(len(passes) < 2 for passes in found.values()):
        raise NotComparable(
            "a file of `python -m bench.suite` with two passes or more is needed: it tells noise by them"
        )
    return found


def check_machines(old: Run, new: Run) -> None:
    """Raises NotComparable unless both ran on the same hardware in the same way."""
    was, now = old.get("machine_info", {}), new.get("machine_info", {})
    differ = [f"{key}: {was.get(key)!r} and {now.get(key)!r}" for key in HARDWARE if was.get(key) != now.get(key)]
    if differ:
        raise NotComparable(
            f"runs of different machines ({'; '.join(differ)}): --any-machine compares them all the same"
        )


def changes(old: Run, new: Run, again: Run | None = None) -> list[Change]:
    """What both runs have, in the order of the new one. ``again``: another run of what ``old`` measured."""
    before, after = benchmarks(old), benchmarks(new)
    both = [name for name in after if name in before]
    if not both:
        raise NotComparable("the runs have no benchmark in common; are they of one --size?")
    noise = {name: [own_noise(before[name]), own_noise(after[name])] for name in both}
    if again is not None:
        repeated = benchmarks(again)
        for name in both:
            if name in repeated:
                noise[name].append(abs(math.log(median(repeated[name]) / median(before[name]))))
    everywhere = float(np.quantile([value for values in noise.values() for value in values], FLOOR_QUANTILE))
    found = []
    for name in both:
        low, high = interval(before[name], after[name])
        was, now = median(before[name]), median(after[name])
        floor = max(LEAST_FLOOR, math.expm1(max(everywhere, *noise[name])))
        found.append(Change(name, was, now, now / was, low, high, floor))
    return found


def report(old: Run, new: Run, found: list[Change]) -> str:
    """Markdown: what was compared, the verdicts, all figures."""
    lines = ["# Comparison of two benchmark runs", "", *about("old", old), *about("new", new), ""]
    slower, faster = (sum(c.verdict == verdict for c in found) for verdict in ("slower", "faster"))
    floors = sorted(c.floor for c in found)
    lines += [
        f"**{slower} slower, {faster} faster**, {len(found) - slower - faster} without a difference beyond noise."
        f" Floors of noise: {floors[0]:.1%} to {floors[-1]:.1%}. Ratio: new / old time, {LEVEL:.0%} interval.",
        "",
        "| benchmark | old, ms | new, ms | ratio | floor | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    order = {"slower": 0, "faster": 1}
    for c in sorted(found, key=lambda c: order.get(c.verdict, 2)):
        name = c.name.split("::")[-1].removeprefix("test_operation[").removesuffix("]")
        verdict = f"**{c.verdict}**" if c.verdict in order else c.verdict
        ratio = f"{c.ratio:.3f} ({c.low:.3f} to {c.high:.3f})"
        lines.append(f"| {name} | {1e3 * c.old:.4g} | {1e3 * c.new:.4g} | {ratio} | {c.floor:.1%} | {verdict} |")
    for which, absent in (("old", missing(new, old)), ("new", missing(old, new))):
        if absent:
            lines += ["", f"Only in the {which} run: {', '.join(absent)}."]
    return "\n".join(lines) + "\n"


def missing(run: Run, other: Run) -> list[str]:
    """Names of ``other`` that ``run`` lacks."""
    return [name.split("::")[-1] for name in benchmarks(other) if name not in benchmarks(run)]


def about(which: str, run: Run) -> Iterator[str]:
    known = run.get("machine", {}) | {"size": run.get("size"), "passes": run.get("passes")}
    shown = (
        "commit",
        "date",
        "size",
        "passes",
        *HARDWARE,
        "load_before",
        "load_after",
        "torch",
        "transformers",
        "triton",
    )
    yield f"- {which}: " + ", ".join(f"{key} {known[key]}" for key in shown if known.get(key) is not None)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--again", type=Path, help="a second run of the old code, for the floor of noise")
    parser.add_argument("--out", type=Path, help="write the report there, too")
    parser.add_argument("--any-machine", action="store_true", help="compare runs of different hardware")
    args = parser.parse_args()
    try:
        old, new, again = (json.loads(path.read_text()) if path else None for path in (args.old, args.new, args.again))
        if not args.any_machine:
            for other in filter(None, (new, again)):
                check_machines(old, other)
        found = changes(old, new, again)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"cannot compare: {error}", file=sys.stderr)
        return 2
    text = report(old, new, found)
    if args.out:
        args.out.write_text(text)
    print(text, end="")
    return int(any(c.verdict == "slower" for c in found))


if __name__ == "__main__":
    sys.exit(main())
