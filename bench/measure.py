"""Interleaved timing and the description of the machine it was done on."""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.kernels import native_name

RESULTS = Path(__file__).parent / "results"


def interleaved(variants: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every call, the variants in turn in every round: a slow minute of the machine meets all of them."""
    for _ in range(warmup):
        for call in variants.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """Median over the rounds of slow / fast, each pair measured next to each other."""
    return ratios(seconds, slow, fast)[1]


def ratios(seconds: Mapping[str, list[float]], slow: str, fast: str) -> list[float]:
    """The least, the median and the most over the rounds of slow / fast."""
    pairs = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    return [min(pairs), statistics.median(pairs), max(pairs)]


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def spread(seconds: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """The shortest and the longest call."""
    return {name: [min(values), max(values)] for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """What a reader needs to know of where the figures come from, and how to get them again."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "kernels": native_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
    }


def processor() -> str:
    """Vendor, name, family and model number: the name alone often says little on a virtual machine."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    fields = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
    keys = {name.strip(): value.strip() for name, value in fields.items()}
    return (
        f"{keys.get('vendor_id')} {keys.get('model name')} (family {keys.get('cpu family')}, model {keys.get('model')})"
    )


def version(package: str) -> str | None:
    """Of an installed package; None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Of the checkout, with "-dirty" where the code differs from it; None outside of git. DIFFPO_COMMIT, where it is set, is
    what a copy of the files knows of it."""
    if known := os.environ.get("DIFFPO_COMMIT"):
        return known

    def git(*arguments: str) -> str:
        asked = ["git", "-C", str(RESULTS.parent), *arguments]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()

    try:
        found = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", ":/", f":(exclude,top){RESULTS.parent.name}/results")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{found}-dirty" if changed else found


def command() -> str:
    """This process's, of files their names alone: where they lie is of no interest elsewhere."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = ["-m", spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name]
    words = [re.sub(r"(^|=)/[^=]*/", r"\1", word) for word in sys.argv[1:]]
    return shlex.join(["python", *start, *words])


def written(path: Path, results: dict[str, Any]) -> None:
    """As JSON, in one step: whatever ends the process, the file is whole."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def save(name: str, results: dict[str, Any]) -> Path:
    """Writes bench/results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    written(path, results)
    return path
