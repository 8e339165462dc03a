"""Whether one run of the benchmarks is slower or faster than another beyond noise.

    python -m bench.compare OLD.json NEW.json [--again OLD2.json] [--out report.md] [--strict] [--any-machine]

Both are files of ``python -m bench.suite`` with three passes or more. The figure is new / old: of the medians over passes
of each pass's median time. Only the engine's own rows are judged; peers are shown, since their code is the same in both
runs: how far they moved is what the machine or a library did. "slower" or "faster" is said only if both hold:

- the 99 % bootstrap interval of that ratio leaves 1 out; drawn again are passes of each direction, and rounds within
  them, since rounds of one process are no independent trials. Of few passes it is too narrow to be enough by itself;
- the ratio is further from 1 than the row's floor, which is what passes of unchanged code do.

The floor is t * noise * sqrt(2 / passes of old + 2 / passes of new), and at least 1 %:

- noise is how the logarithms of a row's pass medians vary among passes of the same direction: every second pass runs
  backwards, and what the order changes is in both runs alike. Two neighbours in time count as one trial (hence the 2),
  since the machine's mood outlasts a pass.
- It is pooled over both runs and the engine's rows of one operation and shape, which differ in dtype or in how the engine
  is used; a row noisier than these keeps its own. In bench/results/suite.json such rows are alike, while an operation's or
  a duration's are not: at one row of a projection passes differ by tens of percents, at 256 rows by two.
- t is Student's quantile for the passes that the noise was told from, so that few passes make wide floors, divided among
  all rows judged (Bonferroni): 5 % of comparisons of unchanged code are to say anything. Simulated with noise as in that
  file, 2 % to 18 % do at 4 passes, 1 % to 8 % at 8: most if neighbours in time are alike (there they correlate by 0.74).
- No floor is above the largest difference of two passes of one direction in any of the engine's rows, in either run, if
  a hundred or more such differences are known: t for a few passes allows for more than any row ever showed.

Passes of one run are minutes apart; ``--again`` takes a second run of the old code at another time: the floor is then at
least the largest difference of the two within an operation and shape.

A floor above 10 % is "too noisy to tell" where nothing greater was found, and a warning says how many such rows there are.
More passes help: floors of 8 are about 0.6 of those of 4.

Exit status: 0 nothing is slower (the warning alone changes nothing), 1 something is, 2 not comparable, or wrong options;
with ``--strict`` 3 if nothing is slower but a row is too noisy to tell. Runs of different hardware, threads or kernels are
refused. For plain tables side by side: ``pytest-benchmark compare OLD.json NEW.json``.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DRAWS = 2000
LEVEL = 0.99
FALSE_ALARMS = 0.05
"""Of comparisons of unchanged code, those that say "slower" or "faster" of anything."""
LEAST_FLOOR, NOISY = 0.01, 0.1
LEAST_PASSES, LEAST_PAIRS = 3, 100
"""So that two are of one direction; differences that a row's floor may be bounded by."""
OWN = ("engine", "tensors", "right draft", "no draft", "token by token", "no server")
"""Implementations that are this project's code; all others are peers."""
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
    judged: bool = True
    """Peers are not."""

    @property
    def verdict(self) -> str:
        if not self.judged:
            return "peer"
        if self.low > 1 and self.ratio > 1 + self.floor:
            return "slower"
        if self.high < 1 and 1 / self.ratio > 1 + self.floor:
            return "faster"
        if self.floor > NOISY:
            return "too noisy to tell"
        return "no difference beyond noise"


def median(passes: Passes) -> float:
    """Over passes, of each pass's median."""
    return float(np.median([np.median(rounds) for rounds in passes]))


def resampled(passes: Passes, random: np.random.Generator) -> np.ndarray:
    """``median`` [DRAWS] of passes drawn with replacement among those of their direction, and of rounds drawn within each."""
    by_pass = []
    for rounds in passes:
        drawn = random.integers(len(rounds), size=(DRAWS, len(rounds)))
        by_pass.append(np.median(np.asarray(rounds)[drawn], axis=1))
    chosen = []
    for direction in (0, 1):
        same = np.arange(direction, len(passes), 2)
        chosen.append(same[random.integers(len(same), size=(DRAWS, len(same)))])
    return np.median(np.stack(by_pass, axis=1)[np.arange(DRAWS)[:, None], np.concatenate(chosen, axis=1)], axis=1)


def interval(old: Passes, new: Passes) -> tuple[float, float]:
    """Bounds of new / old; bootstrap percentiles (Efron & Tibshirani 1993, chapter 13)."""
    random = np.random.default_rng(0)
    low, high = np.quantile(resampled(new, random) / resampled(old, random), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


@dataclass(frozen=True)
class Noise:
    """Of the logarithms of pass medians around the mean of their direction: in how many ``freedom`` degrees."""

    squares: float
    freedom: int
    widest: float
    """Largest difference of two."""

    @classmethod
    def of(cls, passes: Passes) -> "Noise":
        logs = np.log([np.median(rounds) for rounds in passes])
        directions = (logs[::2], logs[1::2])
        squares = sum(float(((same - same.mean()) ** 2).sum()) for same in directions)
        return cls(squares, len(passes) - 2, max(float(np.ptp(same)) for same in directions))

    @classmethod
    def pooled(cls, found: Iterable["Noise"]) -> "Noise":
        squares, freedom, widest = zip(*((one.squares, one.freedom, one.widest) for one in found), strict=True)
        return cls(sum(squares), sum(freedom), max(widest))

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / self.freedom)


@functools.cache
def student(tail: float, freedom: int) -> float:
    """What Student's t exceeds with probability ``tail``; the density integrated on a grid, even in log(1 + t)."""
    grid = np.linspace(0, math.log1p(1e5), 100_001)
    t = np.expm1(grid)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = scale * (1 + t**2 / freedom) ** (-(freedom + 1) / 2) * (1 + t)
    below = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(grid))])
    return float(np.interp(0.5 - tail, below, t))


def benchmarks(run: Run) -> dict[str, Passes]:
    """Rounds of every benchmark by its name. Raises NotComparable for a file with too few passes."""
    found = {b["fullname"]: b["extra_info"].get("passes", []) for b in run.get("benchmarks", [])}
    if not found or any(len(passes) < LEAST_PASSES for passes in found.values()):
        raise NotComparable(
            "a file of `python -m bench.suite` with three passes or more is needed: noise is told by those of one direction"
        )
    return found


def own_rows(run: Run) -> dict[str, tuple[str, str]]:
    """Operation and shape of the engine's own rows, by name."""
    rows = {b["fullname"]: b["extra_info"] for b in run["benchmarks"]}
    return {name: (row["operation"], row["shape"]) for name, row in rows.items() if row["implementation"] in OWN}


def floors(
    before: dict[str, Passes], after: dict[str, Passes], works: dict[str, tuple[str, str]], repeated: dict[str, Passes]
) -> dict[str, float]:
    """Of every row of ``works``, operations and shapes by name. ``repeated``: another run of the code of ``before``."""
    told = {
        name: Noise.pooled(Noise.of(run[name]) for run in (before, after, repeated) if name in run) for name in works
    }
    apart = {name: abs(math.log(median(repeated[name]) / median(before[name]))) for name in works if name in repeated}
    everywhere = Noise.pooled(told.values()) if told else Noise(0.0, 0, 0.0)
    most = everywhere.widest if everywhere.freedom >= LEAST_PAIRS else math.inf
    found = {}
    for name, work in works.items():
        alike = [other for other in works if works[other] == work]
        pooled = Noise.pooled(told[other] for other in alike)
        noise = max(pooled.deviation, told[name].deviation)
        trials = math.sqrt(2 / len(before[name]) + 2 / len(after[name]))
        floor = min(most, student(FALSE_ALARMS / 2 / len(works), pooled.freedom) * noise * trials)
        found[name] = max(LEAST_FLOOR, math.expm1(max(floor, *(apart.get(other, 0.0) for other in alike))))
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
    mine = own_rows(new)
    works = {name: mine[name] for name in both if name in mine}
    floor = floors(before, after, works, {} if again is None else benchmarks(again))
    found = []
    for name in both:
        low, high = interval(before[name], after[name])
        was, now = median(before[name]), median(after[name])
        found.append(Change(name, was, now, now / was, low, high, floor.get(name, math.inf), name in works))
    return found


def summary(found: list[Change]) -> Iterator[str]:
    """What is to be known first."""
    judged, peers = ([c for c in found if c.judged == which] for which in (True, False))
    slower, faster, noisy = (
        sum(c.verdict == verdict for c in judged) for verdict in ("slower", "faster", "too noisy to tell")
    )
    rest = len(judged) - slower - faster - noisy
    yield f"**{slower} slower, {faster} faster**, {rest} without a difference beyond noise, {noisy} too noisy to tell."
    if judged:
        least, middle, most = np.quantile([c.floor for c in judged], (0, 0.5, 1))
        yield (
            f"Floors of noise: {least:.1%} to {most:.1%}, median {middle:.1%}, for {len(judged)} rows judged at once."
            f" Ratio: new / old time, {LEVEL:.0%} interval."
        )
    if peers:
        least, middle, most = np.quantile([c.ratio for c in peers], (0, 0.5, 1))
        yield f"Peers, whose code is not this project's: median ratio {middle:.3f} ({least:.3f} to {most:.3f})."
    if noisy:
        yield (
            f"\n**Warning: {noisy} of {len(judged)} rows are too noisy to tell**: their floors are above {NOISY:.0%},"
            " and a change below its row's floor passes unseen. Run the suite with more --passes, or on a quieter machine."
        )


def report(old: Run, new: Run, found: list[Change]) -> str:
    """Markdown: what was compared, the verdicts, all figures."""
    lines = ["# Comparison of two benchmark runs", "", *about("old", old), *about("new", new), ""]
    lines += [
        *summary(found),
        "",
        "| benchmark | old, ms | new, ms | ratio | floor | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    order = {"slower": 0, "faster": 1, "peer": 3}
    for c in sorted(found, key=lambda c: order.get(c.verdict, 2)):
        name = c.name.split("::")[-1].removeprefix("test_operation[").removesuffix("]")
        verdict = f"**{c.verdict}**" if order.get(c.verdict, 2) < 2 else c.verdict
        floor = f"{c.floor:.1%}" if c.judged else ""
        ratio = f"{c.ratio:.3f} ({c.low:.3f} to {c.high:.3f})"
        lines.append(f"| {name} | {1e3 * c.old:.4g} | {1e3 * c.new:.4g} | {ratio} | {floor} | {verdict} |")
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
    parser.add_argument(
        "--strict", action="store_true", help="exit status 3 if nothing is slower but a row too noisy to tell"
    )
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
    verdicts = {c.verdict for c in found}
    if "slower" in verdicts:
        return 1
    return 3 if args.strict and "too noisy to tell" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
