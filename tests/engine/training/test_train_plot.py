"""``engine.train --plot``: what it draws, and what it refuses; help needs no PyTorch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.train import main
from engine.training.plot import curve, read_log

LOG = [
    {"step": 2, "loss": 5.0, "ar": 3.0, "consistency": 0.2},
    {"step": 3, "eval_loss": 4.0, "eval_ar": 2.5, "eval_consistency": 0.1},
    {"step": 4, "loss": 3.0, "ar": 2.0, "consistency": 0.1},
    {"step": 4, "train_loss": 4.0},
]


def write_state(folder: Path, log: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def test_curves_are_those_of_the_log(tmp_path: Path) -> None:
    log = read_log(write_state(tmp_path / "run", LOG))
    assert curve(log, "ar") == ([2, 4], [3.0, 2.0])
    assert curve(log, "eval_consistency") == ([3], [0.1])


def test_a_run_under_way_is_drawn_up_to_its_last_checkpoint(tmp_path: Path) -> None:
    write_state(tmp_path / "checkpoint-2", LOG[:1])
    write_state(tmp_path / "checkpoint-10", LOG)
    assert read_log(tmp_path) == LOG
    write_state(tmp_path, LOG[:2])
    assert read_log(tmp_path) == LOG[:2]  # finished


def test_the_picture_lies_in_the_folder_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plot", str(write_state(tmp_path / "run", LOG))]) == 0
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"{tmp_path}/run/loss.png shows the losses" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("log", "more", "said"),
    [
        (None, [], "no finished run and no checkpoint"),
        ([], [], "nothing was logged yet"),
        (LOG, ["lr=1"], "takes no settings, got 'lr=1'"),
    ],
)
def test_refusals(
    log: list[dict[str, Any]] | None, more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if log is not None:
        write_state(tmp_path, log)
    assert main(["--plot", str(tmp_path), *more]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "loss.png").exists()


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["--plot", str(write_state(tmp_path, LOG))]) == 2
    assert "pip install 'diffpo-engine[plot]'" in capsys.readouterr().err
    assert main(["--plot", str(tmp_path / "absent")]) == 2


def test_help_needs_no_pytorch() -> None:
    """It took seconds, most of them importing what it does not use."""
    code = (
        "import sys; from engine.train import build_parser; build_parser().format_help(); "
        "sys.exit(', '.join({'torch', 'transformers', 'matplotlib'} & {*sys.modules}) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
