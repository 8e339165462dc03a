"""Verdicts on runs whose truth is known, and files that must not be compared."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from bench import compare
from bench.compare import LEAST_FLOOR, Change, NotComparable, changes, check_machines, interval, main, median, report

MACHINE = {"cpu": "C", "cores": 2, "threads": 2, "kernels": "avx512"}


def run(
    seed: int,
    slowdown: Mapping[str, float] = MappingProxyType({}),
    *,
    count: int = 40,
    passes: int = 4,
    noise: float = 0.02,
    drift: float = 0.02,
) -> dict[str, Any]:
    """Benchmarks of 1 ms times ``slowdown``: log-normal rounds, and passes that are off by ``drift`` as a whole."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(count):
        name = f"bench/suite/test_operations.py::test_operation[b{i}]"
        moods = random.normal(0, drift, passes)
        times = [slowdown.get(f"b{i}", 1.0) * 1e-3 * np.exp(mood + random.normal(0, noise, 20)) for mood in moods]
        found.append({"fullname": name, "extra_info": {"passes": [list(map(float, rounds)) for rounds in times]}})
    return {"machine_info": MACHINE, "machine": MACHINE | {"commit": "abc"}, "size": "quick", "benchmarks": found}


def names(found: list[Change], verdict: str) -> set[str]:
    return {change.name.split("[")[1][:-1] for change in found if change.verdict == verdict}


def test_the_same_code_again_is_no_difference() -> None:
    """3 comparisons of 40 benchmarks of which none changed; an interval of 99 % alone would give an alarm or more."""
    found = [changes(run(2 * i), run(2 * i + 1)) for i in range(3)]
    alarms = [names(one, verdict) for one in found for verdict in ("slower", "faster")]
    assert sum(map(len, alarms)) <= 1
    same = run(0)
    assert all(change.ratio == 1 and change.verdict == "no difference beyond noise" for change in changes(same, same))


def test_a_slowdown_of_ten_percent_is_found() -> None:
    planted = {"b3": 1.1, "b17": 1.1, "b30": 1 / 1.1}
    found = changes(run(0, noise=0.01, drift=0.01), run(1, planted, noise=0.01, drift=0.01))
    assert names(found, "slower") == {"b3", "b17"}
    assert names(found, "faster") == {"b30"}
    slower = next(change for change in found if "[b3]" in change.name)
    assert slower.low < 1.1 < slower.high
    assert slower.ratio == pytest.approx(1.1, rel=0.03)


def test_noise_hides_what_is_smaller() -> None:
    """Passes that differ by 10 %: one of 5 % cannot be told, however many rounds there are."""
    found = changes(run(0, drift=0.1), run(1, {"b3": 1.05}, drift=0.1))
    assert min(change.floor for change in found) > 0.1
    assert not names(found, "slower")


def test_another_run_of_the_old_code_counts_as_noise() -> None:
    """The whole machine was 8 % slower at another time of day, 10 % at a third: no run by itself can tell that."""
    old, new, again = (
        run(seed, {f"b{i}": slowdown for i in range(20)}, count=20, noise=0.005, drift=0.002)
        for seed, slowdown in enumerate((1.0, 1.08, 1.1))
    )
    assert len(names(changes(old, new), "slower")) == 20
    assert not names(changes(old, new, again), "slower")


def test_statistics() -> None:
    assert median([[3.0, 1.0, 2.0], [10.0], [5.0, 7.0]]) == 6.0
    assert interval([[1.0], [1.0]], [[2.0], [2.0]]) == (2.0, 2.0)
    low, high = interval([[1.0], [1.0]], [[1.0], [3.0]])  # passes are drawn, not rounds alone
    assert (low, high) == (1.0, 3.0)
    steady = changes(run(0, noise=0, drift=0), run(0, {"b0": 1.005}, noise=0, drift=0))
    assert {change.floor for change in steady} == {LEAST_FLOOR}
    assert not names(steady, "slower")  # beyond its interval, not beyond the floor


def test_other_machines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(run(0, count=10)))
    new.write_text(json.dumps(run(1, {"b5": 1.5}, count=10) | {"machine_info": MACHINE | {"threads": 1}}))

    def status(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["compare", str(old), str(new), *arguments])
        return main()

    assert status() == 2
    assert "threads: 2 and 1" in capsys.readouterr().err
    assert status("--any-machine", "--out", str(tmp_path / "report.md")) == 1
    text = capsys.readouterr().out
    assert (tmp_path / "report.md").read_text() == text
    assert "**1 slower, 0 faster**, 9 without" in text
    assert text.index("| b5 |") < text.index("| b0 |")  # what changed comes first
    new.write_text(json.dumps(run(1, count=10)))
    assert status() == 0
    new.write_text("{")
    assert status() == 2
    new.write_text("{}")
    assert status("--any-machine") == 2
    assert status("--again", str(tmp_path / "absent.json")) == 2


def test_what_only_one_run_has_is_named() -> None:
    old, new = run(0, count=3), run(1, count=4)
    text = report(old, new, changes(old, new))
    assert "Only in the new run: test_operation[b3]." in text
    assert "Only in the old run" not in text
    assert "- old: commit abc, size quick, cpu C, cores 2, threads 2, kernels avx512" in text
    with pytest.raises(NotComparable, match="no benchmark in common"):
        changes(old, new | {"benchmarks": new["benchmarks"][3:]})


def test_files_without_passes_are_refused() -> None:
    plain = {"benchmarks": [{"fullname": "a", "extra_info": {}, "stats": {"median": 1.0}}]}
    with pytest.raises(NotComparable, match="two passes or more"):
        compare.benchmarks(plain)
    with pytest.raises(NotComparable, match="two passes or more"):
        changes(run(0), run(1, passes=1))
    check_machines(run(0), run(1))
