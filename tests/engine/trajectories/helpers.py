"""What the tests of trajectories share."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.trajectories.command import main

DATA = Path(__file__).parents[3].parent / "shared" / "data" / "alpaca_responses.jsonl"
"""Real trajectories, beside the checkout where there are any."""


def write(path: Path, rows: Iterable[dict[str, Any] | bytes]) -> Path:
    """JSON lines; what is bytes stays as it is."""
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def call(*arguments: object) -> int:
    """Exit status of the command in this process."""
    return main([str(argument) for argument in arguments])


def row(number: int, *responses: tuple[str, str, float | None]) -> dict[str, Any]:
    """A trajectory row."""
    return {
        "prompt_id": f"p{number}",
        "prompt": f"Question {number}?",
        "responses": [{"model": model, "text": text, "reward": reward} for model, text, reward in responses],
    }
