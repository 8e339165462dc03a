"""Tables of the benchmark suite and of the scaling curves."""

from collections.abc import Iterable
from typing import Any

from bench.report.tables import table
from bench.suite.passes import Line, Run, duration, lines

OWN = ("right draft", "no draft", "token by token", "no server")
"""Other ways to use the engine, which are no peers."""
Three = tuple[float, float, float]


def spread(values: Three | None) -> str:
    return "" if values is None else "{:.2f} ({:.2f} to {:.2f})".format(*values)


def rows(found: Iterable[Line]) -> list[list[str]]:
    return [
        [line.operation, line.shape, line.dtype, line.implementation,
         f"{duration(line.seconds[0])} ({duration(line.seconds[1])} to {duration(line.seconds[2])})", spread(line.over_engine)]
        for line in found
    ]  # fmt: skip


HEADER = ["operation", "shape", "dtype", "implementation", "time", "/ engine"]


def suite(run: Run) -> str:
    """Every implementation of every piece of work, with its time over the engine's."""
    return table(HEADER, rows(lines(run)))


def slower(run: Run) -> str:
    """Where another implementation was faster than the engine in every pass."""
    peers = [line for line in lines(run) if line.over_engine is not None and line.implementation not in OWN]
    found = rows(line for line in peers if line.over_engine is not None and line.over_engine[2] < 1)
    return table(HEADER, found) if found else "Nowhere in the suite."


def scaling(results: dict[str, Any]) -> str:
    """Exponents with their intervals beside what was expected."""
    found = []
    for curve in results["curves"]:
        sizes = f"{curve['sizes'][0]:,} to {curve['sizes'][-1]:,}"
        for name, fitted in curve["exponents"].items():
            text = "{exponent:.2f} ({low:.2f} to {high:.2f})".format(**fitted)
            what = f"{curve['name']}, {'memory' if curve['unit'] == 'MB' else 'time'}"
            found.append([what, curve["x"], sizes, name, text, curve["expected"][name], f"{fitted['worst_fit']:.0%}"])
    return table(["cost", "against", "from, to", "implementation", "exponent", "expected", "worst fit"], found)
