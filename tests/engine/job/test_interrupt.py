"""Ctrl-C and SIGTERM: when they are taken, what is on disk then, the exit status."""

import functools
import itertools
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import Refiner
from engine.session import Session
from tests.engine.job.helpers import GOOD, call, command, expected, lines, parse, planned, run, timeless

ROWS = [{"id": f"row {i}", "prompt": "go on " * (i % 7 + 1)} for i in range(40)]


@pytest.fixture
def in_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], list[int]]:
    """Has something happen inside a step; gives the numbers of the steps begun."""

    def arrange(number: int, act: Callable[[], None]) -> list[int]:
        begun: list[int] = []
        real = Session.step

        def step(session: Session) -> Any:
            begun.append(len(begun))
            if len(begun) == number:
                act()
            return real(session)

        monkeypatch.setattr(Session, "step", step)
        return begun

    return arrange


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_the_job_behind_the_step_it_comes_in(
    model: Path,
    refiner: Refiner,
    tmp_path: Path,
    in_step: Callable[..., list[int]],
    number: signal.Signals,
    status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    begun = in_step(20, lambda: signal.raise_signal(number))
    options = ("--max-batch-size", "4", "--window", "2")
    before = signal.getsignal(signal.SIGINT)  # ignored, if the tests run in a shell's background
    got, rows = run(model, tmp_path, lines(ROWS), *options)
    assert (got, len(begun)) == (status, 20)
    assert 0 < len(rows) < len(ROWS)
    want = expected(refiner, ROWS, planned(len(ROWS), window=2))
    assert timeless(rows) == want[: len(rows)]
    errors = capsys.readouterr().err
    assert f"interrupted by {number.name}: the same command goes on" in errors
    assert f"{len(rows)} rows, 0 errors" in errors
    assert "Traceback" not in errors
    assert signal.getsignal(signal.SIGINT) is before
    got, finished = run(model, tmp_path, lines(ROWS), *options)
    assert (got, timeless(finished)) == (0, want)
    said = re.search(r"(\d+) rows, 0 errors \(and (\d+) of an earlier run, 0 errors\)", capsys.readouterr().err)
    assert said
    assert int(said[1]) + int(said[2]) == len(ROWS)
    assert int(said[2]) >= len(rows)


def test_second_ctrl_c_does_not_wait_for_the_step(
    model: Path, tmp_path: Path, in_step: Callable[..., list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    after: list[str] = []

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        after.append("the first")
        signal.raise_signal(signal.SIGINT)
        after.append("the second")

    in_step(20, twice)
    status, rows = run(model, tmp_path, lines(ROWS), "--max-batch-size", "4", "--window", "2")
    assert (status, after) == (130, ["the first"])
    assert 0 < len(rows) < len(ROWS)
    assert "interrupted twice" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_while_the_model_is_loaded_a_signal_is_taken_at_once_and_leaves_no_trace(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int
) -> None:
    after: list[str] = []

    @functools.wraps(Refiner.from_pretrained)
    def load(*arguments: object, **options: object) -> None:
        signal.raise_signal(number)
        after.append("the signal")

    monkeypatch.setattr(Refiner, "from_pretrained", load)
    assert run(model, tmp_path, lines(GOOD)) == (status, [])
    assert after == []
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_while_the_input_is_looked_at_a_signal_is_taken_at_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(lines(GOOD))

    def digest(path: str) -> tuple[str, int]:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr("engine.job.source._digest", digest)
    assert call(model, source, tmp_path / "out.jsonl") == 130
    assert capsys.readouterr().err == "engine.refine: interrupted by SIGINT\n"
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_ctrl_c_leaves_the_finished_rows_as_whole_lines(model: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"id": f"row {i}", "prompt": "go on", "pad": "x" * 500} for i in range(30_000)]
    source.write_bytes(lines(rows))
    arguments = command(model, "--input", str(source), "--output", str(target), "--max-new-tokens", "2")
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 240
        for _ in itertools.takewhile(lambda _: time.monotonic() < deadline, itertools.count()):
            if process.poll() is not None or (target.exists() and target.stat().st_size):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    done = parse(target.read_bytes())
    assert 0 < len(done) < len(rows)
    assert [row["id"] for row in done] == [row["id"] for row in rows[: len(done)]]
    assert "interrupted by SIGINT" in errors
    assert f"{len(done)} rows" in errors
    assert "Traceback" not in errors
