"""Verdicts on runs whose truth is known, and files that must not be compared."""

import copy
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from bench import compare
from bench.compare import (
    LEAST_FLOOR,
    NOISY,
    OWN,
    Change,
    Noise,
    NotComparable,
    changes,
    check_machines,
    interval,
    main,
    median,
    report,
    student,
)
from bench.measure import RESULTS
from bench.suite.conftest import OPERATIONS

MACHINE = {"cpu": "C", "cores": 2, "threads": 2, "kernels": "avx512"}


def run(
    seed: int,
    slowdown: Mapping[str, float] = MappingProxyType({}),
    *,
    count: int = 40,
    passes: int = 4,
    noise: float = 0.02,
    drift: float | Mapping[str, float] = 0.02,
    backwards: float = 1.0,
    peers: int = 0,
    alike: int = 4,
) -> dict[str, Any]:
    """Benchmarks of 1 ms times ``slowdown``: log-normal rounds, and passes that are off by ``drift`` as a whole.

    ``backwards``: times of every second pass. The last ``peers`` are not the engine's; ``alike`` rows are of one shape.
    """
    random = np.random.default_rng(seed)
    found = []
    for i in range(count):
        name = f"bench/suite/test_operations.py::test_operation[b{i}]"
        far = drift if isinstance(drift, float | int) else drift.get(f"b{i}", 0.005)
        moods = random.normal(0, far, passes) + np.arange(passes) % 2 * math.log(backwards)
        times = [slowdown.get(f"b{i}", 1.0) * 1e-3 * np.exp(mood + random.normal(0, noise, 20)) for mood in moods]
        info = {
            "operation": "o",
            "shape": str(i // alike),
            "implementation": "engine" if i < count - peers else "eager",
        }
        found.append(
            {"fullname": name, "extra_info": info | {"passes": [list(map(float, rounds)) for rounds in times]}}
        )
    return {"machine_info": MACHINE, "machine": MACHINE | {"commit": "abc"}, "size": "quick", "benchmarks": found}


def names(found: list[Change], verdict: str) -> set[str]:
    return {change.name.split("[")[1][:-1] for change in found if change.verdict == verdict}


def test_the_same_code_again_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 comparisons of 40 benchmarks of which none changed; the interval alone would give dozens of alarms."""
    monkeypatch.setattr(compare, "DRAWS", 200)
    found = [changes(run(2 * i), run(2 * i + 1)) for i in range(20)]
    alarms = [names(one, verdict) for one in found for verdict in ("slower", "faster")]
    assert sum(map(len, alarms)) <= 1
    assert sum(not change.low < 1 < change.high for one in found for change in one) > 24
    same = run(0)
    assert all(change.ratio == 1 and change.verdict == "no difference beyond noise" for change in changes(same, same))


@pytest.mark.parametrize("passes", [3, 4, 8])
def test_few_passes_give_no_false_certainty(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows on their own, whose noise is told by two passes of a direction or by four: some of them are alike by chance."""
    monkeypatch.setattr(compare, "DRAWS", 200)
    alarms = 0
    for seed in range(20):
        old, new = (run(2 * seed + k, passes=passes, count=20, alike=1, drift=0.1) for k in (0, 1))
        alarms += any(change.verdict in ("slower", "faster") for change in changes(old, new))
    assert alarms <= 2


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
    assert min(change.floor for change in found) > NOISY
    assert not names(found, "slower")
    assert {change.verdict for change in found} == {"too noisy to tell"}
    assert "**Warning: 40 of 40 rows are too noisy to tell**" in report(run(0), run(1), found)


def test_a_noisy_row_or_peer_hides_no_other() -> None:
    """Half of the rows swing by 30 %, the peers by more: a steady row that became 15 % slower is found all the same."""
    swing = {f"b{i}": 0.3 for i in range(20)} | {f"b{i}": 0.6 for i in range(36, 40)}
    found = changes(run(0, drift=swing, peers=4), run(1, {"b30": 1.15}, drift=swing, peers=4))
    assert names(found, "slower") == {"b30"}
    assert not names(found, "faster")
    assert names(found, "peer") == {f"b{i}" for i in range(36, 40)}
    assert names(found, "too noisy to tell") == {f"b{i}" for i in range(20)}
    text = report(run(0), run(1), found)
    assert "Peers, whose code is not this project's: median ratio " in text
    row = next(line for line in text.splitlines() if line.startswith("| b30 |"))
    floor = next(change.floor for change in found if "[b30]" in change.name)
    assert row.endswith(f"| {floor:.1%} | **slower** |")


def test_what_the_order_changes_is_no_noise() -> None:
    """Backwards all takes 1.4 times as long, in both runs: 10 % are found as if it did not."""
    old, new = (
        run(seed, planted, noise=0.01, drift=0.01, backwards=1.4) for seed, planted in ((0, {}), (1, {"b3": 1.1}))
    )
    found = changes(old, new)
    assert names(found, "slower") == {"b3"}
    assert max(change.floor for change in found) < NOISY


def test_a_row_is_no_steadier_than_its_like_or_itself() -> None:
    steady = {change.name: change.floor for change in changes(run(0, drift=0.01), run(1, drift=0.01))}
    noisy = {"b0": 0.2} | {f"b{i}": 0.01 for i in range(1, 40)}
    mixed = {change.name: change.floor for change in changes(run(0, drift=noisy), run(1, drift=noisy))}
    grown = {name.split("[")[1][:-1] for name in steady if mixed[name] > 2 * steady[name]}
    assert grown == {"b0", "b1", "b2", "b3"}
    name = next(name for name in mixed if "[b0]" in name)
    assert mixed[name] == max(mixed.values())


def test_the_committed_run_tells_slower_rows() -> None:
    """Copies of a run of this suite; a row is found where its floor is smaller than what was planted, and no other is."""
    old = json.loads((RESULTS / "suite.json").read_text())
    same = {change.name: change for change in changes(old, old)}
    assert not {change.verdict for change in same.values()} & {"slower", "faster"}
    judged = sorted((change for change in same.values() if change.judged), key=lambda change: change.floor)
    assert len(judged) > 30
    assert judged[0].floor < 0.15
    for factor in (1.15, 1.3):
        for change in (judged[0], judged[-1]):
            new = copy.deepcopy(old)
            row = next(b for b in new["benchmarks"] if b["fullname"] == change.name)
            row["extra_info"]["passes"] = [[factor * s for s in rounds] for rounds in row["extra_info"]["passes"]]
            found = [change.name for change in changes(old, new) if change.verdict in ("slower", "faster")]
            assert found == ([change.name] if change.floor < factor - 1 else [])


def test_the_committed_run_with_passes_drawn_again_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "DRAWS", 200)
    old = json.loads((RESULTS / "suite.json").read_text())
    for seed in range(5):
        random, new = np.random.default_rng(seed), copy.deepcopy(old)
        for row in new["benchmarks"]:
            passes = row["extra_info"]["passes"]
            drawn = [passes[random.choice(np.arange(k % 2, len(passes), 2))] for k in range(len(passes))]
            row["extra_info"]["passes"] = [[float(random.choice(one)) for _ in one] for one in drawn]
        assert not {change.verdict for change in changes(old, new)} & {"slower", "faster"}


def test_every_implementation_is_the_projects_or_a_peer() -> None:
    known = {name for operation in OPERATIONS.values() for name in operation.named("full")}
    assert known - set(OWN) == {
        "eager", "compile", "sdpa", "consistency-llm", "one by one", "generate", "generate, static cache",
    }  # fmt: skip
    assert set(OWN) <= known


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
    low, high = interval([[1.0], [1.0]], [[1.0], [1.0], [3.0], [3.0]])  # passes are drawn, not rounds alone
    assert (low, high) == (1.0, 3.0)
    assert interval([[1.0], [1.0]], [[1.0], [3.0], [1.0], [3.0]]) == (2.0, 2.0)  # among those of their direction
    noise = Noise.of([[1.0], [5.0], [math.e], [5.0], [1.0]])
    assert (noise.freedom, noise.widest) == (3, pytest.approx(1))
    assert noise.squares == pytest.approx(2 / 3)
    pooled = Noise.pooled([noise, Noise(0.5, 1, 2.0)])
    assert (pooled.freedom, pooled.widest, pooled.deviation) == (4, 2.0, pytest.approx(math.sqrt(7 / 24)))
    table = {(0.025, 2): 4.303, (0.005, 4): 4.604, (0.0005, 4): 8.610, (0.001, 30): 3.385, (0.025, 1): 12.706}
    assert {key: round(student(*key), 3) for key in table} == table
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
    assert status() == status("--strict") == 0
    new.write_text(json.dumps(run(1, {"b5": 3.0}, count=10, drift=0.1)))
    assert status("--strict") == 1
    new.write_text(json.dumps(run(1, count=10, drift=0.1)))
    capsys.readouterr()
    assert status() == 0
    assert "rows are too noisy to tell**" in capsys.readouterr().out
    assert status("--strict") == 3
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
    with pytest.raises(NotComparable, match="three passes or more"):
        compare.benchmarks(plain)
    with pytest.raises(NotComparable, match="three passes or more"):
        changes(run(0), run(1, passes=2))
    check_machines(run(0), run(1))
