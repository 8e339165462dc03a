"""What the tests of the batch job share: rows, the command in this process and as one of its own, what it must answer."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import RefineOptions, Refiner, refine
from engine.errors import InvalidRequest
from engine.job.source import Source

MAX_NEW = 12
DATA = Path(__file__).parents[3].parent / "shared" / "data"
"""Real drafts, beside the checkout where there are any."""
OUTPUT_FIELDS = {
    "id", "index", "text", "steps", "converged", "forward_tokens", "finish_reason", "seconds", "error"
}  # fmt: skip
REQUEST_FIELDS = ("prompt", "messages", "prompt_ids", "draft", "draft_ids")
GOOD: list[dict[str, Any]] = [
    {"id": "a", "prompt": "Name a colour", "draft": "red or blue", "source": {"file": "x", "line": 3}},
    {"prompt": "Say hello", "draft": ""},
    {"id": 7, "messages": [{"role": "user", "content": "What is 1+1?"}], "draft": "two \u2028\u00e4"},
    {"id": "ids", "prompt_ids": [5, 6, 7], "draft_ids": [8, 9, 10], "seed": "carried, not used"},
    {"id": "plain", "prompt": "No draft at all", "note": None},
]


def lines(rows: Sequence[dict[str, Any] | bytes]) -> bytes:
    """JSON lines; what is bytes stays as it is."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def parse(output: bytes) -> list[dict[str, Any]]:
    """The rows of an output of whole lines."""
    assert output.endswith(b"\n") or not output
    return [json.loads(line) for line in output.split(b"\n")[:-1]]


def timeless(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without their seconds, which must be there."""
    bare = []
    for row in rows:
        assert isinstance(row["seconds"], int | float)
        assert row["seconds"] >= 0
        row = {name: value for name, value in row.items() if name != "seconds"}
        if "answers" in row:
            row["answers"] = timeless(row["answers"])
        bare.append(row)
    return bare


def call(model: Path, source: Path, target: Path, *options: str) -> int:
    """Exit status of the command in this process; later options win."""
    arguments = ["--model", str(model), "--input", str(source), "--output", str(target)]
    return refine.main([*arguments, "--max-new-tokens", str(MAX_NEW), *options])


def run(model: Path, folder: Path, content: bytes, *options: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and output rows of the command for the content of a .jsonl file."""
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_bytes(content)
    status = call(model, source, target, *options)
    return status, parse(target.read_bytes()) if target.exists() else []


def command(model: Path, *options: str) -> list[str]:
    """The command as a process of its own."""
    return [sys.executable, "-m", "engine.refine", "--model", str(model), *options]


def planned(rows: int | None, **options: Any) -> RefineOptions:
    """The options of a job on a file of that many lines, None: a pipe; steps are those of a fixed number at once."""
    options = {"max_new_tokens": MAX_NEW, **options}
    concurrency = min(64, 16384 // options["max_new_tokens"])
    return RefineOptions(concurrency=concurrency if rows is None else min(concurrency, rows), **options)


def expected(
    refiner: Refiner, rows: Sequence[dict[str, Any]], options: RefineOptions, token_ids: bool = False
) -> list[dict[str, Any]]:
    """What the output holds for good rows, seconds aside: as ``Refiner.refine`` answers them."""
    names = ("id", *REQUEST_FIELDS)
    results = refiner.refine([{name: row[name] for name in names if name in row} for row in rows], options)
    own_fields = sorted(OUTPUT_FIELDS - {"error", "seconds"}) + ["token_ids"] * token_ids
    answered = []
    for row, result in zip(rows, results, strict=True):
        assert result.error is None
        carried = {name: value for name, value in row.items() if name not in names}
        answered.append({**carried, **{name: getattr(result, name) for name in own_fields}, "error": None})
    return answered


def read_rows(path: Path) -> list[Any]:
    """The rows of a file; of a bad one its message."""
    rows: list[Any] = []
    for raw in Source.open(str(path)).read():
        try:
            rows.append(raw())
        except InvalidRequest as error:
            rows.append(str(error))
    return rows


def made(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path
