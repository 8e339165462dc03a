"""Answers, tokens and cost of a build, told now and then."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from engine.job.report import REPORT_SECONDS


class Tally:
    """Counts per model."""

    def __init__(self, prices: Mapping[str, tuple[float, float]], say: Callable[[str], None]) -> None:
        """``prices`` of a million tokens of prompts and of answers."""
        self._prices, self._say = prices, say
        self._counts = {name: [0, 0, 0, 0] for name in prices}  # answers, prompt tokens, answer tokens, truncated
        self._wanted = self._done = self._errors = 0
        self._reported = self._started = time.monotonic()

    def start(self, wanted: int, before: int) -> None:
        self._wanted, self._done = wanted, before
        self._reported = self._started = time.monotonic()
        if before:
            self._say(f"{before} of {wanted} answers are there already")

    def add(self, line: Mapping[str, Any]) -> None:
        """A line of the journal."""
        self._count(line)
        self._done += 1
        self._errors += line["error"] is not None
        now = time.monotonic()
        if now - self._reported >= REPORT_SECONDS:
            self._reported = now
            cost = f", cost of this run {self.cost:.4f}" if self.cost else ""
            self._say(f"{self._done} of {self._wanted} answers, {self._errors} errors{cost}")

    def _count(self, line: Mapping[str, Any]) -> None:
        if line["error"] is None:
            counts = self._counts[line["model"]]
            for i, value in enumerate((1, line["prompt_tokens"], line["completion_tokens"], line["truncated"])):
                counts[i] += int(value)

    @property
    def cost(self) -> float:
        return sum(self._cost(name) for name in self._counts)

    def _cost(self, name: str) -> float:
        _, tokens_in, tokens_out, _ = self._counts[name]
        price_in, price_out = self._prices[name]
        return (tokens_in * price_in + tokens_out * price_out) / 1e6

    def end(self, journal: Iterable[Mapping[str, Any]]) -> None:
        """Says one line per model, and the sum, of a whole journal: that of every run."""
        self._counts = {name: [0, 0, 0, 0] for name in self._prices}
        for line in journal:
            self._count(line)
        for name, (answers, tokens_in, tokens_out, cut) in self._counts.items():
            self._say(
                f"{name}: {answers} answers ({cut} cut at the limit), {tokens_in} prompt tokens, {tokens_out} answer "
                f"tokens, cost {self._cost(name):.4f}"
            )
        if len(self._counts) > 1:
            self._say(f"all: cost {self.cost:.4f}, {time.monotonic() - self._started:.1f} s of this run")
