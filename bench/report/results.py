"""Which files of bench/results/ the page shows, where, and what is known of how each came about."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import RESULTS

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Source:
    """One results file: the section of the page that shows it, what wrote it, and where its spread is."""

    section: str
    command: str
    spread: str
    optional: bool = False
    """Whether the page is complete without it."""
    note: bool = True
    """Whether to tell the run's note; not where the page beside the file does."""


SOURCES: dict[str, Source] = {
    "cpu": Source("Refinement", "python -m bench.run", "least and most over the rounds"),
    "suite": Source(
        "Operations, steps and requests",
        "python -m bench.suite",
        "median, least and most over the passes",
        optional=True,
    ),
    "suite_full": Source(
        "Operations, steps and requests", "make bench-full", "median, least and most over the passes", optional=True
    ),
    "scaling": Source("How cost grows", "python -m bench.scaling", "intervals from rounds drawn again", optional=True),
    "consistency_loss_cpu": Source(
        "Consistency loss", "python -m bench.bench_consistency_loss", "smallest and largest round, in the file"
    ),
    "train_step_cpu": Source("Training step", "python -m bench.bench_train_step", "quartiles over the rounds"),
    "reproduction": Source("Training for fewer steps", "bench/reproduction/run.sh", "intervals over prompts"),
    "training_run": Source(
        "Training for fewer steps", "python -m bench.training_run", "one run, every step in the file"
    ),
    "build": Source("Building trajectories", "python -m bench.bench_build", "rounds, in the file"),
    "serve": Source("Server", "python -m bench.bench_serve", "percentiles over requests; rounds, in the file"),
    "batching": Source("Continuous batching", "python -m bench.bench_batching", "smallest and largest round"),
    "job": Source("Batch command", "python -m bench.bench_job", "not recorded: one run"),
    "kernels_gpu": Source("On a GPU", "bench/gpu.sh --stages kernels", "all repetitions, in the file", optional=True),
    "engine_gpu": Source("On a GPU", "bench/gpu.sh --stages engine", "all repetitions, in the file", optional=True),
    "consistency_loss_gpu": Source(
        "On a GPU", "bench/gpu.sh --stages loss", "all repetitions, in the file", optional=True
    ),
    "async": Source("Server", "python -m bench.bench_async", "percentiles over requests", optional=True),
    "paper_tables": Source(
        "The paper's tables", "python -m bench.reproduction.paper.table", "in the tables", optional=True
    ),
    "peers": Source("Other systems", "python -m bench.peers", "in the tables", optional=True, note=False),
}
"""By the name of the file, in the order of the page."""

UNUSED: dict[str, str] = {}
"""Results that no section shows, and why."""

FOLDERS = {"triton_aot": "Triton kernels, compiled ahead of time"}
"""Folders of results that one table shows as a whole."""


class Results(Mapping[str, Any]):
    """The content of the results files by their names; read when asked for."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder
        self._read: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._read:
            path = self.folder / f"{name}.json"
            if not path.exists():
                raise KeyError(f"{path} is not there")
            self._read[name] = json.loads(path.read_text())
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self.folder.glob("*.json")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return (self.folder / f"{name}.json").exists()


def about(results: Results, name: str) -> str:
    """Hardware, versions, load, spread, command, commit and date of one file, or that they are not recorded."""
    source, found = SOURCES[name], results[name]
    known = found.get("machine") or found.get("machine_info", {}).get("machine") or {}

    def of(key: str, form: str = "{}") -> str:
        value = known.get(key)
        return form.format(f"{value:.2f}" if isinstance(value, float) else value) if value is not None else ""

    def of_all(forms: dict[str, str]) -> str:
        return ", ".join(filter(None, (of(key, form) for key, form in forms.items())))

    hardware = {"gpu": "{}", "cpu": "{}", "cores": "{} cores", "threads": "threads: {}", "kernels": "{} kernels"}
    versions = {"torch": "torch {}", "transformers": "transformers {}", "triton": "Triton {}", "python": "Python {}"}
    loads = {"load_before": "{} before", "load_after": "{} after"}
    command = f"`{known['command']}`" if known.get("command") else f"`{source.command}`, its arguments {NOT_RECORDED}"
    parts = {
        "Hardware": of_all(hardware),
        "versions": of_all(versions),
        "load": of_all(loads),
        "spread": source.spread,
        "command": command,
        "commit": of("commit"),
        "date": of("date"),
    }
    said = "; ".join(f"{key}: {value or NOT_RECORDED}" for key, value in parts.items())
    note = f" Note of the run: {found['note']}." if found.get("note") and source.note else ""
    return f"*[{name}.json]({name}.json). {said}.*{note}"


def listing(results: Results) -> str:
    """Every file of results and where it is shown."""
    lines = ["| file | shown in |", "| --- | --- |"]
    for name in results:
        where = SOURCES[name].section if name in SOURCES else f"not shown: {UNUSED[name]}"
        lines.append(f"| [{name}.json]({name}.json) | {where} |")
    for folder, section in FOLDERS.items():
        lines.append(f"| [{folder}/]({folder}) | {section} |")
    return "\n".join(lines)
