"""What `make demo` runs: the refiner corrects drafts, shown side by side, timed against decoding token by token."""

import argparse
import difflib
import json
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from engine import RefineOptions, Refiner, Result
from engine.options import DEFAULT_CONDITION

DRAFTS = Path(__file__).parent / "drafts.jsonl"
REPEATS, REPEAT_SECONDS = 3, 10.0
"""Most runs that are timed; no further one starts after so many seconds."""
GAP = "   "

REFINE = RefineOptions(condition=DEFAULT_CONDITION)
TOKEN_BY_TOKEN = RefineOptions(condition=DEFAULT_CONDITION, window=1, realign=False)

Row = dict[str, Any]
Word = tuple[str, bool]
"""A word and whether it was changed."""


class Style:
    """How changed words look: bold and coloured on a terminal, else between marks."""

    def __init__(self) -> None:
        self.colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def mark(self, words: list[str], before: bool) -> list[str]:
        if self.colour or not words:
            return words
        start, end = ("[-", "-]") if before else ("{+", "+}")
        return f"{start}{' '.join(words)}{end}".split()

    def paint(self, word: str, before: bool) -> str:
        return f"\033[1;{31 if before else 32}m{word}\033[0m" if self.colour else word

    def bold(self, text: str) -> str:
        return f"\033[1m{text}\033[0m" if self.colour else text


def compare(draft: str, refined: str, style: Style) -> tuple[list[Word], list[Word]]:
    """The words of both texts, each with whether it differs from the other text."""
    before, after = draft.split(), refined.split()
    left: list[Word] = []
    right: list[Word] = []
    for kind, i, i_end, j, j_end in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        old, new, changed = before[i:i_end], after[j:j_end], kind != "equal"
        left += [(word, changed) for word in (style.mark(old, True) if changed else old)]
        right += [(word, changed) for word in (style.mark(new, False) if changed else new)]
    return left, right


def wrap(words: list[Word], width: int, before: bool, style: Style) -> list[str]:
    """Lines of exactly ``width`` visible columns."""
    lines: list[str] = []
    line, used = "", 0
    for word, changed in words:
        for part in (word[i : i + width] for i in range(0, len(word), width)):
            if used and used + 1 + len(part) > width:
                lines.append(line + " " * (width - used))
                line, used = "", 0
            space = " " if used else ""
            line += space + (style.paint(part, before) if changed else part)
            used += len(space) + len(part)
    return [*lines, line + " " * (width - used)]


def show(row: Row, result: Result, columns: int, style: Style) -> None:
    """Draft and refined answer next to each other, and what it took."""
    width = (columns - len(GAP)) // 2
    print(style.bold(f"{result.id}: {row['prompt']}"))
    if result.error:
        print(f"error: {result.error}\n")
        return
    left, right = compare(row["draft"], result.text or "", style)
    before, after = wrap(left, width, True, style), wrap(right, width, False, style)
    before.insert(0, "draft".ljust(width))
    after.insert(0, "refined".ljust(width))
    for i in range(max(len(before), len(after))):
        columns_of_line = (lines[i] if i < len(lines) else " " * width for lines in (before, after))
        print(GAP.join(columns_of_line).rstrip())
    tokens = len(result.token_ids)
    print(f"{result.steps} steps, {tokens} tokens, {tokens / max(result.steps, 1):.1f} accepted tokens per step\n")


@dataclass(frozen=True)
class Timing:
    """Runs over the same rows with the same options."""

    results: list[Result]
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def tokens(self) -> int:
        return sum(len(result.token_ids) for result in self.results)

    def __str__(self) -> str:
        runs = len(self.seconds)
        spread = f"median of {runs} runs, {min(self.seconds):.2f} to {max(self.seconds):.2f} s" if runs > 1 else "1 run"
        return f"{self.median:7.2f} s  {self.tokens / self.median:7.1f} tokens/s   ({spread})"


def measure(refiner: Refiner, rows: list[Row], together: bool) -> tuple[Timing, Timing]:
    """Times refining and decoding token by token in turns, all rows together or one after the other."""
    timings = Timing([], []), Timing([], [])
    started = time.perf_counter()
    while not timings[0].seconds or (
        len(timings[0].seconds) < REPEATS and time.perf_counter() - started < REPEAT_SECONDS
    ):
        for timing in timings:
            timing.results.clear()
            timing.seconds.append(0.0)
        # in turns batch by batch, so that whatever else the machine does slows both alike
        for batch in [rows] if together else [[row] for row in rows]:
            for timing, options in zip(timings, (REFINE, TOKEN_BY_TOKEN), strict=True):
                start = time.perf_counter()
                timing.results.extend(refiner.refine(batch, options))
                timing.seconds[-1] += time.perf_counter() - start
    return timings


def report(title: str, refined: Timing, plain: Timing) -> bool:
    """Prints both timings and their ratio; whether both gave the same tokens."""
    same = sum(a.token_ids == b.token_ids for a, b in zip(refined.results, plain.results, strict=True))
    answers = len(refined.results)
    print(
        f"{title}\n"
        f"  refining from the draft {refined}\n"
        f"  token by token          {plain}\n"
        f"  speed ratio             {plain.median / refined.median:.2f}x, measured in this run against the same engine "
        f"decoding token by token (window=1, realign=False)\n"
        f"  token ids of both       "
        + (
            f"identical for all {answers} answers"
            if same == answers
            else f"DIFFERENT for {answers - same} of {answers}"
        )
    )
    return same == answers


def read_rows(path: Path, count: int) -> list[Row]:
    """The first rows of the file, with the fields of a request only."""
    with path.open(encoding="utf-8") as file:
        rows = list(islice((json.loads(line) for line in file if line.strip()), count))
    return [{name: row[name] for name in ("id", "prompt", "draft")} for row in rows]


def main() -> int:
    """Runs the demonstration; 1 if the two ways of decoding disagree anywhere or a row has an error."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=20, help="drafts to refine (default: %(default)s)")
    parser.add_argument("--input", type=Path, default=DRAFTS, help="JSON lines with id, prompt and draft")
    parser.add_argument("--model", help="checkpoint folder or hub id (default: the refiner that ships)")
    args = parser.parse_args()
    rows, style = read_rows(args.input, max(args.rows, 1)), Style()
    if not rows:
        parser.error(f"{args.input} holds no rows")
    columns = max(shutil.get_terminal_size((100, 24)).columns, 40)
    with Refiner.from_pretrained(args.model) as refiner:
        start = time.perf_counter()
        for row in rows:  # also the warm-up of what is timed below
            show(row, refiner.refine([row], REFINE)[0], columns, style)
            sys.stdout.flush()
        shown = time.perf_counter() - start
        alone = measure(refiner, rows, together=False)
        batch = measure(refiner, rows, together=True)
    results = alone[0].results
    answered = [result for result in results if not result.error]
    tokens = sum(len(result.token_ids) for result in answered) / max(len(answered), 1)
    steps = sum(result.steps for result in answered) / max(len(answered), 1)
    print(f"{len(rows)} drafts refined and shown in {shown:.2f} s")
    print(f"steps per answer: {steps:.1f}; a token-by-token decoder takes one step per token: {tokens:.1f}")
    same = report("one draft at a time:", *alone)
    same &= report(f"all {len(rows)} drafts at once:", *batch)
    return 0 if same and len(answered) == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
