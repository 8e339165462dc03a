"""What the tests of evaluation share."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.evaluate.command import main
from engine.evaluate.run import Evaluation
from tests.engine.job.stub import stubbed

SCORERS = "tests.engine.evaluate.scorers"
MODELS = ("one", "two/2b")


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def questions(count: int, models: Sequence[str] = MODELS) -> list[dict[str, Any]]:
    """Rows of prompt and draft, by every model; the stub's answer to one is a function of both."""
    return [
        {
            "prompt": f"Question {number}?" + " Please." * (number % 3),
            "draft": f"The {model} answer" + " here" * (number * 7 % 5) + ".",
            "model": model,
            "category": ("easy", "hard")[number % 2],
        }
        for number in range(count)
        for model in models
    ]


def model_folder(folder: Path) -> Path:
    """What the stub is loaded from."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    return model


def evaluate(
    folder: Path,
    rows: Iterable[dict[str, Any]],
    *options: object,
    command: str = "rewards",
    scorer: str | None = "letters",
    cut: Callable[[str], tuple[str, bool]] = lambda text: (text, False),
) -> tuple[int, Path]:
    """Runs the command with the stub in the place of a refiner; exit status and output folder. ``scorer`` is of
    scorers.py, ``cut`` what becomes of a draft at the limit."""
    write(folder / "in.jsonl", rows)
    with stubbed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluation, "_cutter", lambda self: cut)  # the stub has no tokenizer
        arguments = [
            command, "--input", folder / "in.jsonl", "--output", folder / "out", "--model", model_folder(folder),
            *(["--callable", f"{SCORERS}:{scorer}"] if scorer else []), "--no-report", *options,
        ]  # fmt: skip
        return main([str(argument) for argument in arguments]), folder / "out"
