"""The one file of results: every stage puts its figures beside those already there, also when two run at once."""

import fcntl
import json
from pathlib import Path
from typing import Any

from bench.reproduction.measure import dump


def read(path: Path) -> dict[str, Any]:
    """Empty where there is no file yet."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def update(path: Path, section: str, value: Any) -> None:
    """Sets a section; of a section given as section/entry that entry alone."""
    section, _, entry = section.partition("/")
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = read(path)
        if entry:
            results.setdefault(section, {})[entry] = value
        else:
            results[section] = value
        path.write_text(dump(results))
