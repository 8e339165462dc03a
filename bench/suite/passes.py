"""What several passes of the benchmarks found, as one file in pytest-benchmark's format."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pytest_benchmark.stats import Stats

ROUNDS_KEPT = 30
"""Of every test and pass, evenly spaced over it."""
FIELDS = ("min", "max", "mean", "stddev", "rounds", "median", "iqr", "q1", "q3", "iqr_outliers", "stddev_outliers",
          "outliers", "ld15iqr", "hd15iqr", "ops", "total")  # fmt: skip
Run = dict[str, Any]


def merged(passes: list[Run], about: dict[str, Any]) -> Run:
    """One file of all passes: each benchmark's rounds by pass in ``extra_info["passes"]``, its ``stats`` over all of them.

    ``about``: what to say of the run as a whole. Raises ValueError where passes are not of the same benchmarks.
    """
    by_name = [{found["fullname"]: found for found in one["benchmarks"]} for one in passes]
    first = by_name[0]
    if any(found.keys() != first.keys() for found in by_name):
        raise ValueError("a pass lacks benchmarks that another has")
    out = {key: value for key, value in passes[0].items() if key not in ("benchmarks", "machine")}
    loads = [one["machine"]["load_before"] for one in passes]
    out |= {"machine": passes[0]["machine"] | about | {"load_after_passes": loads}, "passes": len(passes)}
    out["benchmarks"] = [of_all([found[name] for found in by_name]) for name in first]
    return out


def of_all(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One benchmark of all passes."""
    rounds = [thinned(one["stats"]["data"]) for one in found]
    stats = Stats()
    for seconds in (s for of_pass in rounds for s in of_pass):
        stats.update(seconds)
    kept = {key: getattr(stats, key) for key in FIELDS} | {"iterations": found[0]["stats"]["iterations"]}
    short = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in kept.items()}
    return found[0] | {"stats": short, "extra_info": found[0]["extra_info"] | {"passes": rounds}}


def thinned(rounds: list[float]) -> list[float]:
    """At most ROUNDS_KEPT of them, to four digits: what is behind is not reproducible."""
    step = -(-len(rounds) // ROUNDS_KEPT)
    return [float(f"{seconds:.4g}") for seconds in rounds[::step]]


@dataclass(frozen=True)
class Line:
    """One implementation of one piece of work, beside the engine's. Seconds and ratios: median, least and most over passes."""

    operation: str
    shape: str
    dtype: str
    implementation: str
    seconds: tuple[float, float, float]
    over_engine: tuple[float, float, float] | None


def lines(run: Run) -> Iterator[Line]:
    """In the order of the file. Ratios are taken within a pass, where both were timed one after the other."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for found in run["benchmarks"]:
        groups.setdefault(found["group"], {})[found["extra_info"]["implementation"]] = found
    for group in groups.values():
        ours = [statistics.median(rounds) for rounds in group["engine"]["extra_info"]["passes"]]
        for name, found in group.items():
            info = found["extra_info"]
            each = [statistics.median(rounds) for rounds in info["passes"]]
            ratio = None if name == "engine" else summary([a / b for a, b in zip(each, ours, strict=True)])
            yield Line(info["operation"], info["shape"], info["dtype"], name, summary(each), ratio)


def summary(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def duration(seconds: float) -> str:
    """Three digits in the unit that fits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError
