"""The folder of an evaluation: what it may be continued with, what is begun anew, and what rows were measured with."""

import json
import os
import platform
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.evaluate.results import JUDGES, RESULTS, RUNS, write_whole
from engine.evaluate.variants import Variant
from engine.job.book import Files
from engine.job.output import Claim, Refused, Settings, difference, read_finished, read_record
from engine.job.source import Fields

WORK = "work"
OVERWRITING = "overwriting"
"""In results.json from the start of a run with --overwrite to its end: the same command then goes on."""


@dataclass(frozen=True, slots=True)
class Folder:
    """Rows of every variant, ``results.json``, and in ``work`` what a run is resumed from."""

    path: Path

    @property
    def work(self) -> Path:
        """Where what a run is resumed from lies."""
        return self.path / WORK

    def begin(
        self, setting: dict[str, Any], shown: dict[str, Any], variants: Sequence[Variant], *, overwrite: bool
    ) -> None:
        """Records what is evaluated. Raises Refused where the folder holds something else, unless that may be overwritten."""
        self.work.mkdir(parents=True, exist_ok=True)
        before = self._record()
        known: dict[str, Any] = before.get("variants", {})
        made = {variant.name: variant.fields() for variant in variants}
        changed = difference(before.get("setting"), setting) if before else None
        clash = sorted(name for name in made if name in known and _without_runs(known[name]) != made[name])
        goes_on = bool(before.get(OVERWRITING)) and not changed and not clash and set(known) == set(made)
        anew = overwrite and not goes_on
        if changed and not anew:
            raise Refused(f"{self.path} holds another evaluation ({changed}): give another --output, or --overwrite")
        if clash and not anew:
            raise Refused(
                f"{self.path} has {', '.join(clash)} with other options: give another --output, or --overwrite"
            )
        if anew:
            self._drop(known, made.keys())
        record = {
            **({OVERWRITING: True} if anew or goes_on else {}),
            "setting": setting,
            "shown": shown,
            "variants": {
                **({} if anew else known),
                **{name: {**fields, RUNS: known.get(name, {}).get(RUNS, [])} for name, fields in made.items()},
            },
        }
        self._write_record(record)

    def end(self) -> None:
        """Every variant that was asked for is complete."""
        self._write_record({name: value for name, value in self._record().items() if name != OVERWRITING})

    def note_run(self, variant: str, load_options: dict[str, Any], *, fresh: bool) -> None:
        """Records what a variant's rows are computed with, beside that of those kept."""
        record, now = self._record(), setup(load_options)
        before = [] if fresh else record["variants"][variant][RUNS]
        record["variants"][variant][RUNS] = [*(run for run in before if run != now), now]
        self._write_record(record)

    def _record(self) -> dict[str, Any]:
        """What results.json holds; nothing where there is none."""
        path = self.path / RESULTS
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found

    def _write_record(self, record: dict[str, Any]) -> None:
        write_whole(self.path / RESULTS, (json.dumps(record, indent=1) + "\n").encode())

    def _drop(self, known: dict[str, Any], asked: Collection[str]) -> None:
        """Removes what is begun anew: all but the refined answers of the variants asked for, which their own settings judge.
        Raises Refused where another process writes them."""
        for name in sorted({path.name.partition(".jsonl")[0] for path in self.work.glob("*.jsonl*")}):
            variant, _, kind = name.rpartition(".")
            path = self.work / f"{name}.jsonl"
            if kind == "scores" or (kind == "refined" and variant not in asked):
                drop_book(path)
            elif kind == "input" and variant not in asked:
                path.unlink(missing_ok=True)
        for path in (*(self.path / f"{name}.jsonl" for name in known), *(self.path / JUDGES).glob("*.jsonl")):
            path.unlink(missing_ok=True)


def is_of(output: Path, settings: Settings) -> bool:
    """Whether the rows of an output can be read and were made with these settings."""
    try:
        for _ in read_finished(output) if output.exists() else ():
            pass
    except Refused:
        return False
    return difference(read_record(output)[0], settings) is None


def drop_book(rows: Path) -> None:
    """Removes an output with everything beside it. Raises Refused where another process writes it."""
    files = Files(rows, rows)
    with Claim(rows) as claim:
        for path in (rows, files.retry, *files.all_ahead):
            path.unlink(missing_ok=True)
        claim.remove()


def setup(load_options: dict[str, Any]) -> dict[str, Any]:
    """What decides how long an answer takes."""
    import torch
    import transformers

    names = ("dtype", "device", "max_batch_size", "max_batch_tokens", "kv_cache_tokens")
    return {
        **{name: str(load_options[name]) for name in names},
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _without_runs(variant: Fields) -> Fields:
    return {name: value for name, value in variant.items() if name != RUNS}
