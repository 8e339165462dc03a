"""Data-parallel runs: parts that know nothing of each other, put together once, in order."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from engine import refine
from tests.engine.job.crash import CrashPoint
from tests.engine.job.stub import DEADLINE, Workplace, finish, indices, start, wait, write

pytestmark = pytest.mark.usefixtures("no_fsync")

REAL_ROWS = 800
ROWS: list[dict[str, Any]] = [{"id": f"id {i}", "prompt": f"row {i}", "draft": "d" * (i * 7 % 11)} for i in range(11)]


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    made = Workplace(tmp_path / "place")
    write(made, ROWS)
    return made


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a single process makes of ROWS, without timings."""
    made = Workplace(tmp_path_factory.mktemp("single"))
    write(made, ROWS)
    assert made.main() == 0
    return made.result


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_parts_are_merged_in_order_by_whoever_ends_last(
    place: Workplace, result: bytes, order: tuple[int, ...]
) -> None:
    for rank in order[:-1]:
        assert place.main(rank=(rank, 3)) == 0
        assert not place.output.exists()
    assert place.main(rank=(order[-1], 3)) == 0
    assert place.result == result
    assert place.files() == ["out.jsonl", "out.jsonl.job"]
    assert sorted(place.asked) == sorted(row["prompt"] for row in ROWS)
    assert place.main(rank=(0, 3)) == place.main() == 0
    assert place.result == result
    assert len(place.asked) == len(ROWS)


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
@pytest.mark.parametrize("output", ["out.jsonl", "out.json"])
def test_fewer_rows_than_ranks(tmp_path: Path, rows: int, output: str) -> None:
    single, place = Workplace(tmp_path / "single", output), Workplace(tmp_path / "place", output)
    for made in (single, place):
        write(made, ROWS[:rows])
    assert single.main() == 0
    assert [place.main(rank=(rank, 4)) for rank in range(4)] == [0] * 4
    assert place.result == single.result
    assert place.files() == [output, f"{output}.job"]


def test_running_at_once(place: Workplace, result: bytes) -> None:
    children = [start(lambda rank=rank: place.main(rank=(rank, 3)), place.log) for rank in range(3)]  # type: ignore[misc]
    assert [finish(child) for child in children] == [0, 0, 0], place.said
    assert place.result == result
    assert place.files() == ["out.jsonl", "out.jsonl.job"]


def merges(place: Workplace) -> int:
    record = (place.folder / "out.jsonl.job").read_bytes().splitlines()[1]
    return int(json.loads(record)["merges"])


def test_both_ending_at_the_same_moment_merge_once(place: Workplace, result: bytes) -> None:
    """Rank 0 is stopped before each of its operations in turn while rank 1 ends."""
    operations = CrashPoint(0, "nothing")
    with operations.installed():
        assert place.main(rank=(0, 2)) == 0
    assert place.main(rank=(1, 2)) == 0
    with_merge = len(operations.done) + 12
    for at in range(1, with_merge):
        for path in place.folder.glob("out*"):
            path.unlink()

        def run(at: int = at) -> int:
            with CrashPoint(at, "paused").installed():
                return place.main(rank=(0, 2))

        first = start(run, place.log)
        _, status = os.waitpid(first, os.WUNTRACED)
        second = start(lambda: place.main(rank=(1, 2)), place.log)
        other = wait(second, 0.3)  # it waits where the first one holds the output
        if os.WIFSTOPPED(status):
            os.kill(first, signal.SIGCONT)
            assert finish(first) == 0, place.said
        else:
            assert os.waitstatus_to_exitcode(status) == 0
        assert (finish(second) if other is None else other) == 0, place.said
        assert place.result == result
        assert place.files() == ["out.jsonl", "out.jsonl.job"]
        assert merges(place) == 1


@pytest.mark.parametrize("output", ["out.jsonl", "out.json"])
def test_errors_are_retried_in_every_part(tmp_path: Path, output: str) -> None:
    rows = [{"id": i, "prompt": f"row {i}" + (", large" if i in (0, 3, 4) else "")} for i in range(8)]
    rows[6] = {"id": 6, "prompt": "row 6, unanswerable"}
    place, single = Workplace(tmp_path / "place", output), Workplace(tmp_path / "single", output)
    for made in (place, single):
        write(made, rows)
    small, large = ("--kv-cache-tokens", "512"), ("--kv-cache-tokens", "2048", "--retry-errors")
    assert [single.main(*small), single.main(*large)] == [3, 3]
    assert [place.main(*small, rank=(rank, 2)) for rank in (0, 1)] == [0, 3]
    place.asked_file.unlink()
    assert [place.main(*large, rank=(rank, 2)) for rank in (1, 0)] == [0, 3]
    assert sorted(place.asked) == ["row 0, large", "row 3, large", "row 4, large", "row 6, unanswerable"]
    assert place.result == single.result
    assert place.files() == [output, f"{output}.job"]


def test_parts_left_by_an_earlier_merge_do_not_stand_for_a_retry(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    write(place, [{"prompt": f"row {i}, large"} for i in range(4)])
    small, large = ("--kv-cache-tokens", "512"), ("--kv-cache-tokens", "2048", "--retry-errors")
    assert place.main(*small, rank=(0, 2)) == 0
    left = {path: path.read_bytes() for path in tmp_path.glob("*.part-*")}
    assert len(left) == 2
    assert place.main(*small, rank=(1, 2)) == 3
    for path, content in left.items():
        path.write_bytes(content)  # as if the merge had been killed before it removed them
    assert place.main(*large, rank=(1, 2)) == 0
    assert b'"error": null' not in place.output.read_bytes(), "nothing may be merged without rank 0's retry"
    assert place.main(*large, rank=(0, 2)) == 0
    assert place.output.read_bytes().count(b'"error": null') == 4
    assert place.files() == ["out.jsonl", "out.jsonl.job"]


def test_another_number_of_ranks(place: Workplace, result: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.main(rank=(0, 2)) == 0
    left = place.files()
    assert place.main(rank=(0, 3)) == 2
    assert "another number of ranks" in capsys.readouterr().err
    assert place.files() == left
    assert [place.main("--overwrite", rank=(rank, 3)) for rank in range(3)] == [0, 0, 0]
    assert place.result == result
    assert place.files() == ["out.jsonl", "out.jsonl.job"]


def test_a_part_of_other_options(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.main(rank=(0, 2)) == 0
    assert place.main("--seed", "1", rank=(0, 2)) == 2
    assert "options seed 0, now 1" in capsys.readouterr().err
    assert place.main("--seed", "1", rank=(1, 2)) == 0
    assert "ranks [0] are not" in capsys.readouterr().err
    assert not place.output.exists(), "parts made with different options are not put together"


@pytest.mark.parametrize(
    "environment", [{}, {"RANK": "0"}, *({"RANK": rank, "WORLD_SIZE": "2"} for rank in ("a", "2", "-1"))]
)
def test_without_torchrun(
    place: Workplace, environment: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert place.main("--data-parallel") == 2
    assert "needs RANK and WORLD_SIZE" in capsys.readouterr().err
    assert place.files() == []


@pytest.mark.parametrize("options", [["--unordered"], ["--input", "-"], ["--output", "-"]])
def test_options_that_do_not_go_with_it(
    place: Workplace, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.main(*options, rank=(0, 2)) == 2
    assert f"cannot be used with {' '.join(options)}" in capsys.readouterr().err


def test_one_killed_and_the_other_finishes_its_part(place: Workplace, result: bytes) -> None:
    def run() -> int:
        with CrashPoint(12, "paused").installed():
            return place.main(rank=(0, 2))

    first = start(run, place.log)
    assert os.WIFSTOPPED(os.waitpid(first, os.WUNTRACED)[1])
    second = start(lambda: place.main(rank=(1, 2)), place.log)
    os.kill(first, signal.SIGKILL)
    assert finish(first) == -signal.SIGKILL
    assert finish(second) == 0
    assert "this part is complete, ranks [0] are not" in place.said
    finished = indices((place.folder / "out.jsonl.part-00000-of-00002").read_bytes())
    assert 0 < len(finished) < 6
    place.asked_file.unlink()
    assert place.main(rank=(0, 2)) == 0
    assert place.result == result
    assert place.asked == [f"row {i}" for i in range(0, 11, 2) if i not in finished]


def command(place: Workplace, model: Path) -> list[str]:
    options = ["--input", str(place.input), "--output", str(place.output), "--max-new-tokens", "24"]
    return ["--model", str(model), *options, "--max-batch-size", "4"]


@contextmanager
def torchrun(place: Workplace, model: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """The real command under torchrun with two ranks; ended with all its children if the test fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with place.log.open("ab") as log:
        process = subprocess.Popen(
            [*launcher, "-m", "engine.refine", "--data-parallel", *command(place, model)],
            stderr=log, stdout=log, env=environment,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # it ends its workers
            process.wait(60)


def worker(launcher: int, rank: int) -> int | None:
    """Process id of a rank."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        try:
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in environment:
            return int(child)
    return None


def kill_in_the_middle(place: Workplace, process: "subprocess.Popen[bytes]", rank: int) -> None:
    """SIGKILL for one rank, as soon as both have written rows."""
    parts = [place.folder / f"out.jsonl.part-0000{i}-of-00002" for i in range(2)]
    deadline = time.monotonic() + DEADLINE
    while not all(part.exists() and part.stat().st_size for part in parts):
        assert process.poll() is None, place.said
        assert time.monotonic() < deadline, place.said
        time.sleep(0.005)
    child = worker(process.pid, rank)
    assert child is not None
    os.kill(child, signal.SIGKILL)


def write_real(place: Workplace) -> Workplace:
    write(place, [{"id": f"id {i}", "prompt": f"row {i}", "draft": "abc"} for i in range(REAL_ROWS)])
    return place


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a single process with the real model makes of an input that takes some seconds."""
    place = write_real(Workplace(tmp_path_factory.mktemp("single-real")))
    assert finish(start(lambda: refine.main(command(place, model)), place.log)) == 0, place.said
    return place.result


linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")


@linux
@pytest.mark.slow
def test_torchrun_with_a_rank_killed_then_run_again(tmp_path: Path, model: Path, single: bytes) -> None:
    place = write_real(Workplace(tmp_path))
    with torchrun(place, model) as process:
        kill_in_the_middle(place, process, 1)
        assert process.wait(DEADLINE) != 0
    assert "rank 0: this part is complete, ranks [1] are not" in place.said
    part = place.folder / "out.jsonl.part-00000-of-00002"
    assert indices(part.read_bytes()) == list(range(0, REAL_ROWS, 2)), "the survivor has gone on"
    assert not place.output.exists()
    with torchrun(place, model) as process:
        assert process.wait(DEADLINE) == 0, place.said
    assert place.result == single
    assert place.files() == ["out.jsonl", "out.jsonl.job"]


@linux
@pytest.mark.slow
def test_torchrun_restarts_by_itself(tmp_path: Path, model: Path, single: bytes) -> None:
    place = write_real(Workplace(tmp_path))
    with torchrun(place, model, "--max-restarts", "1") as process:
        kill_in_the_middle(place, process, 0)
        assert process.wait(DEADLINE) == 0, place.said
    assert place.result == single
    assert place.files() == ["out.jsonl", "out.jsonl.job"]
