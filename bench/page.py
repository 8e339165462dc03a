"""A page of tables beside the results that it is made of."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.measure import RESULTS


def write_page(about: str | None, name: str, make: Callable[[dict[str, Any], Path], str]) -> None:
    """The command line of a table module: writes and prints what ``make`` says of a results file, ``name``.json by default,
    as the .md beside it."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--results", type=Path, default=RESULTS / f"{name}.json")
    path = parser.parse_args().results
    text = make(json.loads(path.read_text()), path)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
