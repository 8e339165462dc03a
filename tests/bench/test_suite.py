"""Every benchmark runs, on tiny shapes, and what several passes found is put together rightly."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.suite.case import Case, distance
from bench.suite.passes import ROUNDS_KEPT, duration, lines, merged, thinned

ROOT = Path(__file__).parents[2]


def test_every_benchmark_runs_and_its_implementations_agree(tmp_path: Path) -> None:
    out = tmp_path / "pass.json"
    options = [
        "--size=tiny",
        "--threads=1",
        "--benchmark-max-time=0",
        "--benchmark-min-time=0",
        "--benchmark-min-rounds=1",
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench/suite",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--benchmark-json={out}",
        *options,
    ]
    # pytest-benchmark measures nothing where it takes itself for a worker of pytest-xdist
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:]
    found = json.loads(out.read_text())
    timed = {(b["extra_info"]["operation"], b["extra_info"]["implementation"]) for b in found["benchmarks"]}
    operations = {operation for operation, _ in timed}
    assert operations == {
        "linear", "linear_argmax", "paged_attention", "rms_norm", "rope_kv_write", "gated_activation", "jacobi_accept",
        "consistency_loss", "train_step", "refine", "server",
    }  # fmt: skip
    assert {(operation, "engine") for operation in operations} <= timed
    assert len(timed) >= 2 * len(operations)
    assert {"cpu", "cores", "threads", "kernels", "torch", "transformers"} <= found["machine_info"].keys()
    assert {"commit", "date", "load_before"} <= found["machine"].keys()
    assert "node" not in found["machine_info"]
    run = merged([found, found], {"command": "c"})
    assert run["machine"]["command"] == "c"
    assert len(list(lines(run))) == len(found["benchmarks"])
    assert all(line.over_engine is None or line.over_engine[1] == line.over_engine[2] for line in lines(run))


def one_pass(engine: list[float], eager: list[float], load: float = 1.0) -> dict[str, Any]:
    found = [
        {
            "fullname": name, "group": "g", "stats": {"data": data, "iterations": 3},
            "extra_info": {"operation": "o", "shape": "1x2", "dtype": "float32", "implementation": name},
        }
        for name, data in (("engine", engine), ("eager", eager))
    ]  # fmt: skip
    return {"machine_info": {"cpu": "C"}, "machine": {"load_before": load}, "benchmarks": found}


def test_ratios_are_of_one_pass() -> None:
    """The machine was twice as slow in the second pass: that is no part of the ratio."""
    run = merged([one_pass([1.0, 1.0, 9.0], [3.0]), one_pass([2.0], [6.0]), one_pass([1.0], [4.0], 5.0)], {})
    ours, theirs = lines(run)
    assert (ours.implementation, ours.seconds, ours.over_engine) == ("engine", (1.0, 1.0, 2.0), None)
    assert theirs.over_engine == (3.0, 3.0, 4.0)
    assert theirs.seconds == (4.0, 3.0, 6.0)
    stats = run["benchmarks"][0]["stats"]
    assert (stats["median"], stats["max"], stats["rounds"], stats["iterations"]) == (1.0, 9.0, 5, 3)
    assert run["machine"]["load_after_passes"] == [1.0, 1.0, 5.0]
    with pytest.raises(ValueError, match="lacks benchmarks"):
        merged([one_pass([1.0], [1.0]), {"machine": {}, "benchmarks": []}], {})


def test_rounds_kept_and_durations() -> None:
    kept = thinned([i / 7 for i in range(1, 1000)])
    assert len(kept) <= ROUNDS_KEPT
    assert kept[0] == 0.1429
    assert [duration(s) for s in (2.0, 0.0123456, 1.5e-6, 2e-9)] == ["2 s", "12.3 ms", "1.5 µs", "0.002 µs"]


def test_implementations_that_differ_are_no_comparison() -> None:
    x = torch.ones(4)
    Case({"engine": lambda: (x, [1]), "eager": lambda: (x + 1e-6, [1])}).check(["engine", "eager"])
    with pytest.raises(AssertionError, match=r"eager is 1\.0e-01 from engine"):
        Case({"engine": lambda: x, "eager": lambda: x * 1.1}).check(["engine", "eager"])
    with pytest.raises(AssertionError, match="eager is inf"):
        Case({"engine": lambda: [1], "eager": lambda: [2]}).check(["engine", "eager"])
    assert distance(torch.zeros(2), torch.zeros(2)) == 0
