"""How a job goes and went: statistics, progress on standard error, a metrics file."""

import dataclasses
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from engine.job.rows import Row

REPORT_SECONDS = 10.0
BAR_SECONDS = 0.5


@dataclasses.dataclass(slots=True)
class Statistics:
    """Sums over the rows of this run; those after ``error_types`` are of refined answers only."""

    before: int = 0
    """Rows that an earlier run had finished."""
    errors_before: int = 0
    rows: int = 0
    ahead: int = 0
    """Rows finished before earlier ones when the job ended, and set aside for the next run."""
    errors: int = 0
    error_types: Counter[str] = dataclasses.field(default_factory=Counter)
    answers: int = 0
    """More than one for a row of several turns."""
    tokens: int = 0
    steps: int = 0
    forward_tokens: int = 0

    def add(self, row: Row) -> None:
        self.rows += 1
        if row.error:
            self.errors += 1
            self.error_types[type(row.error).__name__] += 1
            return
        for result in row.results:
            self.answers += 1
            self.tokens += len(result.token_ids)
            self.steps += result.steps
            self.forward_tokens += result.forward_tokens

    @property
    def all_errors(self) -> int:
        """Error rows in the output."""
        return self.errors + self.errors_before

    def summary(self, seconds: float) -> str:
        earlier = f" (and {self.before} of an earlier run, {self.errors_before} errors)" if self.before else ""
        ahead = f", {self.ahead} behind unfinished ones set aside" if self.ahead else ""
        return (
            f"{self.rows} rows, {self.errors} errors{earlier}{ahead}, {seconds:.1f} s, "
            f"{_ratio(self.tokens, seconds)} tokens/s, "
            f"{_ratio(self.steps, self.answers)} steps per answer, "
            f"{_ratio(self.forward_tokens, self.tokens)} token-forwards per output token"
        )

    def metrics(self, seconds: float) -> dict[str, Any]:
        """The same as an object; ratios are null where nothing was counted."""

        def ratio(total: float, count: float) -> float | None:
            return total / count if count else None

        return {
            "rows": self.rows,
            "errors": self.errors,
            "error_types": dict(self.error_types),
            "rows_before": self.before,
            "errors_before": self.errors_before,
            "rows_set_aside": self.ahead,
            "answers": self.answers,
            "seconds": seconds,
            "tokens": self.tokens,
            "steps": self.steps,
            "forward_tokens": self.forward_tokens,
            "rows_per_second": ratio(self.rows, seconds),
            "tokens_per_second": ratio(self.tokens, seconds),
            "steps_per_answer": ratio(self.steps, self.answers),
            "forward_tokens_per_token": ratio(self.forward_tokens, self.tokens),
        }


def _ratio(total: float, count: float) -> str:
    return f"{total / count:.2f}" if count else "-"


class Reporter:
    """Progress on standard error: a bar on a terminal, else a line now and then; at the end a summary."""

    def __init__(self, metrics_file: Path | None = None, rank: int | None = None, name: str = "engine.refine") -> None:
        self.statistics = Statistics()
        self._metrics_file = metrics_file
        self._name = name if rank is None else f"{name} rank {rank}"
        self._bar_wanted = rank is None and sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._total: int | None = None
        self._shown = 0.0
        self._started = self._reported = time.monotonic()

    def start(self, total: int | None, before: int, errors_before: int) -> None:
        """What is there; ``total`` of the whole file, where it is known."""
        self.statistics.before, self.statistics.errors_before = before, errors_before
        self._total = total
        if before:
            self.say(f"{before} rows are finished already, {errors_before} of them errors")

    def begin(self) -> None:
        """The model is there: what is timed starts here."""
        self._started = self._reported = time.monotonic()
        if self._bar_wanted:
            before, total = self.statistics.before, self._total
            self._bar = tqdm(unit=" rows", total=total, initial=before, file=sys.stderr, dynamic_ncols=True)

    def add(self, row: Row) -> None:
        self.statistics.add(row)
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update()
        if now - self._reported >= REPORT_SECONDS:
            self._reported = now
            try:
                self._write_metrics("running")
            except OSError as error:  # no reason to end the job
                self.say(f"the metrics could not be written: {error}")
            if self._bar is None:
                of = f" of {self._total}" if self._total is not None else ""
                rate = _ratio(self.statistics.tokens, now - self._started)
                rows = self.statistics.before + self.statistics.rows
                self.say(f"{rows}{of} rows, {self.statistics.errors} errors, {rate} tokens/s")

    def tick(self, running: int, ahead: int) -> None:
        """Between steps: keeps the bar alive while rows that come first take long."""
        now = time.monotonic()
        if self._bar is None or now - self._shown < BAR_SECONDS:
            return
        self._shown = now
        waiting = f", {ahead} finished behind them" if ahead else ""
        self._show(f", {running} running{waiting}")

    def _show(self, more: str) -> None:
        assert self._bar is not None
        rate = _ratio(self.statistics.tokens, time.monotonic() - self._started)
        self._bar.set_postfix_str(f"{self.statistics.errors} errors, {rate} tokens/s{more}")

    def end(self, state: str) -> None:
        """``state``: finished, interrupted, stopped or failed. Says the summary; raises OSError if metrics can't be written."""
        self.close()
        statistics = self.statistics
        if state == "finished" and statistics.before and not statistics.rows:
            self.say(f"nothing left to do: {statistics.before} rows, {statistics.errors_before} errors")
        else:
            self.say(statistics.summary(time.monotonic() - self._started))
        self._write_metrics(state)

    def close(self) -> None:
        """Ends the bar, so that other lines can follow."""
        if self._bar is not None:
            self._show("")
            self._bar.close()
            self._bar, self._bar_wanted = None, False

    def say(self, text: str) -> None:
        line = f"{self._name}: {text}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def _write_metrics(self, state: str) -> None:
        if self._metrics_file is None:
            return
        metrics = {"state": state, **self.statistics.metrics(time.monotonic() - self._started)}
        text = json.dumps(metrics, indent=2)
        new = self._metrics_file.with_name(self._metrics_file.name + ".new")
        new.write_text(text + "\n", encoding="utf-8")
        os.replace(new, self._metrics_file)  # a reader sees the old or the new, never a part
