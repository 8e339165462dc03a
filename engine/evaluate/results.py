"""The files of a folder, read back: the record of how they were made, and the rows of every variant."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.job.source import Fields, Source

RESULTS = "results.json"
RUNS = "runs"
"""Of a variant in the record: the setups its rows were computed with, the last one last."""
JUDGES = "judges"
"""Folder of imported verdicts."""


@dataclass(frozen=True, slots=True)
class Results:
    """An evaluated folder."""

    folder: Path
    record: dict[str, Any]
    rows: dict[str, list[Fields]]
    """By variant, in the order they were asked for."""
    judges: dict[str, list[Fields]]
    """Verdicts by the judge's name."""

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """Raises ValueError where there is no evaluation, OSError."""
        path = folder / RESULTS
        if not path.exists():
            raise ValueError(f"{folder} has no {RESULTS}: give the --output of rewards or controls")
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = {
            name: read_lines(folder / f"{name}.jsonl")
            for name in record["variants"]
            if (folder / f"{name}.jsonl").exists()
        }
        if not rows:
            raise ValueError(f"{folder} holds no finished rows yet: run its command to the end")
        judges = {path.stem: read_lines(path) for path in sorted((folder / JUDGES).glob("*.jsonl"))}
        return cls(folder, record, rows, judges)

    def setups(self, name: str) -> list[dict[str, Any]]:
        """What a variant's rows were computed with; nothing where that is not recorded."""
        before = self.record["shown"].get("run")  # of folders written before it was kept by variant
        return self.record["variants"][name].get(RUNS) or ([before] if before else [])

    def variant(self, name: str) -> list[Fields]:
        """Raises ValueError where there is none of that name."""
        if name not in self.rows:
            raise ValueError(f"{self.folder} has no variant {name!r}: it has {', '.join(self.rows)}")
        return self.rows[name]


def read_lines(path: Path) -> list[Fields]:
    """All rows of a file of JSON lines."""
    return [raw() for raw in Source.open(str(path)).read()]


def compared(rows: Iterable[Fields]) -> list[Fields]:
    """The rows that have both sides' rewards."""
    return [row for row in rows if row["error"] is None]


def write_whole(path: Path, data: bytes) -> None:
    """A file that appears whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(data)
    os.replace(new, path)
