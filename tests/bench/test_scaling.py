"""Exponents of known power laws, and the curves on sizes that take no time."""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.measure import RESULTS
from bench.scaling import __main__ as command
from bench.scaling import memory
from bench.scaling.curves import CURVES, Curve
from bench.scaling.fit import exponent

SIZES = (16, 32, 64, 128, 256)


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law(power: float) -> None:
    found = exponent(SIZES, [[3e-5 * size**power] * 4 for size in SIZES])
    assert found.exponent == pytest.approx(power, abs=1e-9)
    assert (found.low, found.high) == pytest.approx((power, power), abs=1e-9)
    assert found.worst_fit == pytest.approx(0, abs=1e-9)


def test_noise_widens_the_interval_and_outliers_do_not_move_it() -> None:
    random = np.random.default_rng(0)
    values = [[size * float(np.exp(noise)) for noise in random.normal(0, 0.05, 9)] for size in SIZES]
    found = exponent(SIZES, values)
    assert found.low < 1 < found.high
    assert 0.01 < found.high - found.low < 0.1
    for rounds in values:
        rounds[0] *= 50  # another process, once
    assert exponent(SIZES, values).exponent == pytest.approx(found.exponent, abs=0.03)


def test_a_fixed_cost_is_seen_in_the_worst_fit() -> None:
    found = exponent(SIZES, [[100.0 + size] * 3 for size in SIZES])
    assert 0 < found.exponent < 1
    assert found.worst_fit > 0.1


@pytest.mark.parametrize("values", [[[1.0]], [[1.0], [0.0]], [[1.0], [-1.0]]])
def test_no_exponent(values: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="positive values of at least two different sizes"):
        exponent([4, 8][: len(values)], values)


def test_a_run_on_small_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every curve but for its sizes; each variant has an expectation, every figure follows from the values beside it."""
    small = {
        "vocabulary": (64, 128),
        "rows": (2, 4),
        "rows of each stream": (4, 8),
        "batch": (1, 2),
        "answer length": (2, 4),
    }
    curves = [dataclasses.replace(curve, sizes=small.get(curve.x, (16, 32))) for curve in CURVES]
    monkeypatch.setattr(command, "CURVES", curves)
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "LEAST_SECONDS", 0)
    monkeypatch.setattr(memory, "AXES", {})
    monkeypatch.setattr(sys, "argv", ["scaling", "--rounds", "2", "--note", "small"])
    assert command.main() == 0
    assert (tmp_path / "scaling.png").stat().st_size > 1000
    results = json.loads((tmp_path / "scaling.json").read_text())
    assert results["note"] == "small"
    assert [curve["name"] for curve in results["curves"]] == [curve.name for curve in CURVES]
    check(results)


def test_the_committed_exponents_are_those_of_the_committed_times() -> None:
    check(json.loads((RESULTS / "scaling.json").read_text()))


def check(results: dict[str, Any]) -> None:
    for curve in results["curves"]:
        assert curve["values"].keys() == curve["exponents"].keys() == curve["expected"].keys()
        for name, values in curve["values"].items():
            assert dataclasses.asdict(exponent(curve["sizes"], values)) == pytest.approx(curve["exponents"][name])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_beyond_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager holds the logits of both streams, of 256 rows by 16384 words 16 MB each, the engine a few rows of each thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = memory.measured("vocabulary", 1, [16384])
    assert found.keys() == {"engine", "eager"}
    [[eager]], [[engine]] = found["eager"], found["engine"]
    assert eager > 2 * 16 > engine


def test_a_curve_is_timed_in_turn() -> None:
    called: list[tuple[str, int]] = []
    curve = Curve("c", "n", (1, 2), {}, lambda n: {name: partial(called.append, (name, n)) for name in ("a", "b")})
    found = command.seconds(curve, 3)
    assert {name: [len(rounds) for rounds in values] for name, values in found.items()} == {"a": [3, 3], "b": [3, 3]}
    order = [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    changes = [call for call, before in zip(called, [None, *called], strict=False) if call != before]
    assert changes == order * 4  # once to warm up and to see how often, then in three rounds
