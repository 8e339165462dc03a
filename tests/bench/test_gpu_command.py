"""bench/gpu.sh: its options, what it says where something is missing, and that all of it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import targets
from tests.bench.gpu_cases import ROOT


@pytest.mark.slow
def test_the_whole_command_runs_on_a_cpu(tmp_path: Path) -> None:
    """Every stage, with a test of each file and without compiling what ours is compared with."""
    variables = {"OUT": str(tmp_path), "PYTHON": sys.executable, "JOBS": "0", "FEW": "1", "TORCHDYNAMO_DISABLE": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= variables | {"OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "bench/gpu.sh"), "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "kernels_gpu_dry_run.json").read_text())["kernels"]
    timed = {case["operation"] for records in found.values() for case in records if case["variants"]["ours"]["seconds"]}
    assert timed == {operation for operation, _, _ in targets.KERNELS}
    record = json.loads((tmp_path / "engine_gpu_dry_run.json").read_text())["engine"]["tiny"]
    assert record["step"]["seconds"]["launched"] > 0
    assert record["host_gaps"]["steps"] > 4
    operations = {"paged_attention", "linear_argmax", "rms_norm", "rope_kv_write", "gated_activation", "jacobi_accept"}
    assert record["launched"]["operations"].keys() == operations | {"jacobi_pack"}
    assert not any(calls["torch"] for calls in record["launched"]["operations"].values())
    whole = record["one_launch"]["no draft"]
    assert (whole["tokens_equal"], whole["launches"] < whole["steps"] / 2) == (1, True)
    for batch in ("batch 1", "batch 2"):
        assert record[batch]["right_draft_kept"] == 1
        assert record[batch]["tokens_equal_to_generate"] == 1
    assert "public script's loop, random draft" in record["batch 1"]["seconds"]
    loss = json.loads((tmp_path / "consistency_loss_gpu_dry_run.json").read_text())
    assert "median_seconds" in loss["tiny"]["variants"]["triton dense"]
    assert loss["machine"]["commit"]
    assert len(list(tmp_path.iterdir())) == 8


def shell(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "bench/gpu.sh"), *arguments]
    environment = os.environ | variables
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


def test_unknown_stages_are_refused() -> None:
    done = shell("--stages", "tests,speed")
    assert (done.returncode, done.stderr) == (2, "unknown stage speed\n")
    done = shell("--seconds", "1.5")
    assert (done.returncode, done.stderr) == (2, "--seconds needs a whole number, got 1.5\n")


@pytest.mark.slow
def test_candidates_for_the_tiles_are_timed(tmp_path: Path) -> None:
    done = shell("--stages", "tune", "--dry-run", OUT=str(tmp_path), PYTHON=sys.executable, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "tune_gpu_dry_run.json").read_text())
    for operation in ("linear_argmax", "paged_attention"):
        [record] = found[operation].values()
        assert record["table"]["median_seconds"] > 0
        seconds = [candidate["median_seconds"] for candidate in record["candidates"]]
        assert seconds == sorted(seconds)
        assert all(candidate["difference"] < 1e-5 for candidate in record["candidates"])


def test_help() -> None:
    done = shell("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("One command that certifies")
    assert "--stages tune" in done.stdout
    assert "set -u" not in done.stdout


STAND_IN = """#!/bin/sh
[ "$1" = -c ] && exec {python} "$@"
echo "$PYTHONPATH $DIFFPO_COMMIT $@"
exit ${{STATUS:-0}}
"""


def test_relative_paths_are_those_of_the_caller(tmp_path: Path) -> None:
    """With something else for Python that says what it was given."""
    (tmp_path / "python").write_text(STAND_IN.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    given = {"OUT": "out", "PYTHON": "./python", "PYTHONPATH": "mine:/elsewhere", "DIFFPO_COMMIT": "abc"}
    done = shell("--stages", "kernels", "--dry-run", "--seconds", "100", cwd=tmp_path, **given)
    assert done.returncode == 0, done.stderr
    path, commit, *command = (tmp_path / "out/kernels_gpu.log").read_text().split()
    assert path.split(":")[1:] == [str(tmp_path / "mine"), "/elsewhere"]
    assert (commit, command[:5], command[6:]) == (
        "abc",
        "-m bench.gpu.run --stages kernels --seconds".split(),
        ["--dry-run"],
    )
    assert 60 < int(command[5]) <= 80
    done = shell("--stages", "kernels", cwd=tmp_path, STATUS="3", **given)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "failed: kernels")


@pytest.mark.parametrize(("absent", "status"), [("hypothesis", 1), ("xdist", 0)])
def test_what_is_missing_is_said(absent: str, status: int, tmp_path: Path) -> None:
    """Without hypothesis there are no tests; without xdist they run one after the other."""
    (tmp_path / "python").write_text(
        f"""#!/bin/sh
case "$2" in *find_spec*) shift 2; for m; do [ $m = {absent} ] && echo $m; done; exit;; esac
[ "$1" = -c ] && exec {sys.executable} "$@"
echo "$@"
"""
    )
    (tmp_path / "python").chmod(0o755)
    done = shell("--stages", "tests", "--dry-run", OUT=str(tmp_path / "out"), PYTHON=str(tmp_path / "python"))
    log = (tmp_path / "out/tests_gpu.log").read_text()
    assert done.returncode == status
    if status:
        assert log == "-- tests: not run: Python lacks hypothesis\n"
    else:
        assert "-m pytest" in log
        assert " -n " not in log


SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
echo "$MESSAGE"
exit 1
"""


@pytest.mark.parametrize(
    ("message", "status"),
    [("Error: Device not supported. Please refer to the manual", 0), ("Invalid __global__ write", 1)],
)
def test_a_sanitizer_that_cannot_watch_the_gpu_has_found_nothing(message: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "compute-sanitizer").write_text(SANITIZER)
    (tmp_path / "compute-sanitizer").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = shell("--stages", "sanitizer", OUT=str(tmp_path / "out"), PYTHON=sys.executable, PATH=path, MESSAGE=message)
    assert done.returncode == status
    assert ("-- sanitizer: not run: " in (tmp_path / "out/sanitizer_gpu.log").read_text()) == (not status)


@pytest.mark.slow
def test_a_stage_that_is_stopped_says_what_has_failed(tmp_path: Path) -> None:
    """pytest's summary comes though the time has ended."""
    (tmp_path / "test_slow.py").write_text("import time\ndef test_a(): assert 0\ndef test_b(): time.sleep(60)\n")
    (tmp_path / "python").write_text(
        f"""#!/bin/sh
[ "$1" = -m ] && exec {sys.executable} -m pytest -p no:cacheprovider -n 2 {tmp_path}/test_slow.py
exec {sys.executable} "$@"
"""
    )
    (tmp_path / "python").chmod(0o755)
    options = ("--stages", "tests", "--dry-run", "--seconds", "12")
    done = shell(*options, OUT=str(tmp_path / "out"), PYTHON=str(tmp_path / "python"))
    assert done.returncode == 1
    log = (tmp_path / "out/tests_gpu.log").read_text()
    assert "def test_a(): assert 0" in log
    assert "1 failed in" in log
