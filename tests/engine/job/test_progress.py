"""What a job says on standard error and in its metrics file."""

import fcntl
import json
import logging
import os
import pty
import re
import shutil
import struct
import sys
import termios
import threading
from pathlib import Path

import pytest

from engine import Refiner
from engine.job import report
from tests.engine.job.helpers import GOOD, lines, planned, run

MEASURES = ("tokens/s", "steps per answer", "token-forwards per output token")


def test_summary_and_progress_lines(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "REPORT_SECONDS", 0.0)
    status, rows = run(model, tmp_path, lines([*GOOD, b"{"]))
    errors = capsys.readouterr().err.splitlines()
    total = len(GOOD) + 1
    assert (status, len(rows)) == (3, total)
    assert len(errors) == total + 1
    for done, line in enumerate(errors[:-1], 1):
        assert line.startswith(f"engine.refine: {done} of {total} rows, {int(done == total)} errors, "), line
    assert errors[-1].startswith(f"engine.refine: {total} rows, 1 errors, ")
    for measure in MEASURES:
        assert measure in errors[-1]


def test_few_lines_in_a_pipe(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(model, tmp_path, lines(GOOD))
    errors = capsys.readouterr().err
    assert errors.count("\n") <= 2  # the summary, and on a very slow machine one line of progress
    assert "\r" not in errors
    assert "\x1b" not in errors


def test_figures_of_the_summary(
    model: Path, refiner: Refiner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "metrics.json"
    run(model, tmp_path, lines([*GOOD, b"{", {"prompt": "x" * 3000}]), "--metrics-file", str(file))
    names = ("prompt", "messages", "prompt_ids", "draft", "draft_ids")
    requests = [{name: row[name] for name in names if name in row} for row in GOOD]
    results = refiner.refine(requests, planned(len(GOOD) + 2))
    tokens, steps = sum(len(r.token_ids) for r in results), sum(r.steps for r in results)
    forward = sum(r.forward_tokens for r in results)
    metrics = json.loads(file.read_text())
    seconds = metrics.pop("seconds")
    assert seconds > 0
    assert metrics == {
        "state": "finished",
        "rows": len(GOOD) + 2,
        "errors": 2,
        "error_types": {"InvalidRequest": 1, "RequestTooLong": 1},
        "rows_before": 0,
        "errors_before": 0,
        "rows_set_aside": 0,
        "answers": len(GOOD),
        "tokens": tokens,
        "steps": steps,
        "forward_tokens": forward,
        "rows_per_second": (len(GOOD) + 2) / seconds,
        "tokens_per_second": tokens / seconds,
        "steps_per_answer": steps / len(GOOD),
        "forward_tokens_per_token": forward / tokens,
    }
    summary = capsys.readouterr().err.splitlines()[-1]
    assert f"{steps / len(GOOD):.2f} steps per answer" in summary
    assert f"{forward / tokens:.2f} token-forwards per output token" in summary


def test_second_run_counts_what_was_there_before(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "metrics.json"
    content = lines([*GOOD, b"{"])
    assert run(model, tmp_path, content)[0] == 3
    capsys.readouterr()
    status, rows = run(model, tmp_path, content, "--metrics-file", str(file))
    assert (status, len(rows)) == (3, len(GOOD) + 1)
    metrics = json.loads(file.read_text())
    counted = {name: metrics[name] for name in ("rows", "errors", "rows_before", "errors_before", "steps_per_answer")}
    assert counted == {
        "rows": 0, "errors": 0, "rows_before": len(GOOD) + 1, "errors_before": 1, "steps_per_answer": None
    }  # fmt: skip
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"engine.refine: nothing left to do: {len(GOOD) + 1} rows, 1 errors"


def test_metrics_are_kept_up_to_date_and_say_how_it_ended(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "REPORT_SECONDS", 0.0)
    states: list[tuple[str, int]] = []
    real = os.replace

    def replace(new: Path, file: Path) -> None:
        metrics = json.loads(Path(new).read_text())
        states.append((metrics["state"], metrics["rows"]))
        real(new, file)

    monkeypatch.setattr("engine.job.report.os.replace", replace)
    arguments = ("--metrics-file", str(tmp_path / "metrics.json"), "--on-error", "stop")
    assert run(model, tmp_path, lines([*GOOD, b"{"]), *arguments)[0] == 3
    running = [("running", done) for done in range(1, len(GOOD) + 1)]
    assert [state for state in states if state[0] == "running"] == running
    assert states[-1] == ("stopped", len(GOOD))


class Terminal:
    """A pseudo terminal in place of standard error."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # a new one has no columns
        self.stream = os.fdopen(slave, "w", buffering=1)
        self._read: list[bytes] = []
        self._thread = threading.Thread(target=self._drain)
        self._thread.start()

    def _drain(self) -> None:
        try:
            while piece := os.read(self._master, 65536):
                self._read.append(piece)
        except OSError:  # how a terminal ends
            pass

    def text(self) -> str:
        """All that was shown; ends the terminal."""
        self.stream.close()
        self._thread.join(60)
        os.close(self._master)
        return b"".join(self._read).decode()


def test_bar_on_a_terminal(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal.stream)
        try:
            status, _ = run(model, tmp_path, lines([*GOOD, b"{"] * 10))
        finally:
            shown = terminal.text()
    assert status == 3
    assert "\r" in shown
    assert re.search(r"0/60 ", shown)
    assert re.search(r"60/60 .*10 errors, [\d.]+ tokens/s", shown)
    last = shown.replace("\r\n", "\n").splitlines()[-1]
    assert last.startswith("engine.refine: 60 rows, 10 errors, ")
    for measure in MEASURES:
        assert measure in last


def test_bar_moves_while_the_first_row_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal.stream)
        patch.setattr(report, "BAR_SECONDS", 0.0)
        try:
            reporter = report.Reporter()
            reporter.start(9, 0, 0)
            reporter.begin()
            reporter.tick(5, 0)
            reporter.tick(4, 1)
            reporter.close()
        finally:
            shown = terminal.text()
    assert "0/9 " in shown
    assert shown.index("5 running]") < shown.index("4 running, 1 finished behind them]")


def test_bar_is_gone_before_an_error_is_said(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal.stream)
        try:
            status, _ = run(model, tmp_path, lines([*GOOD, b"{"]), "--on-error", "stop")
        finally:
            shown = terminal.text()
    assert status == 3
    said = shown.replace("\r\n", "\n").split("\n")
    assert any(line.startswith(f"engine.refine: stopped at row {len(GOOD)} ") for line in said), shown


def test_long_drafts_bring_no_warnings_of_other_libraries(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 16}))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        status, _ = run(folder, tmp_path, lines([{"prompt": "x", "draft": "y" * 100}, {"prompt": "z" * 3000}]))
    finally:
        logger.removeHandler(caplog.handler)
    assert status == 3
    assert [record.getMessage() for record in caplog.records if record.name.startswith("transformers")] == []
