"""What the GPU benchmark makes of its measurements, and that its engine stage runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import kernels
from bench.gpu.case import Case
from bench.gpu.run import ours_failed
from bench.gpu.timing import Stopwatch
from engine.roofline import Roofline

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_the_floor_is_the_larger_of_bytes_and_arithmetic() -> None:
    ceilings = Roofline(bytes_per_second=100.0, flops_per_second=1000.0)
    assert ceilings.floor(50, 100) == 0.5
    assert ceilings.floor(5, 900) == 0.9


def test_a_case_records_every_variant_and_what_fails() -> None:
    x = torch.arange(6.0)

    def broken() -> object:
        raise RuntimeError("no such shape")

    case = Case(
        "doubling", "6", {"eager": lambda: x + x, "ours": lambda: 2 * x, "off": lambda: 2.2 * x, "peer": broken}, 48, 6
    )
    record = kernels.one(case, Stopwatch(CPU), Roofline(1e9, 1e9), rounds=2)
    variants = record["variants"]
    assert variants["eager"]["difference_from_ours"] == 0
    assert variants["off"]["difference_from_ours"] == pytest.approx(0.1, rel=1e-3)
    assert "no such shape" in variants["peer"]["error"]
    assert len(variants["ours"]["seconds"]) == 2
    assert variants["ours"]["share_of_floor"] == pytest.approx(
        record["floor_seconds"] / variants["ours"]["median_seconds"]
    )
    assert not ours_failed([record])
    case.variants["ours"] = broken
    assert ours_failed([kernels.one(case, Stopwatch(CPU), Roofline(1e9, 1e9), rounds=1)])


def test_what_counts_as_a_failure() -> None:
    assert ours_failed({"linear_argmax": [{"error": "ValueError: wrong"}]})
    assert not ours_failed({"linear_argmax": [{"shape": "1", "error": "left out: no time"}]})
    assert not ours_failed({"gemma": {"step": {"rows": 1}}})


def test_integers_differ_by_their_share() -> None:
    a = torch.tensor([1, 2, 3, 4])
    assert kernels.difference((a, a.float()), (a.clone(), a.float())) == 0
    assert kernels.difference(a, torch.tensor([1, 2, 3, 5])) == 0.25
    assert kernels.difference(None, None) is None


@pytest.mark.slow
def test_the_engine_stage_runs_on_tiny_models(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu.run", "--dry-run", "--stages", "engine"]
    environment = os.environ | {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    record = json.loads((tmp_path / "engine_gpu_dry_run.json").read_text())["engine"]["tiny"]
    assert record["step"]["seconds"]["launched"] > 0
    for batch in ("batch 1", "batch 2"):
        assert record[batch]["right_draft_kept"] == 1
        assert record[batch]["tokens_equal_to_generate"] == 1
    assert "public script's loop, random draft" in record["batch 1"]["seconds"]
