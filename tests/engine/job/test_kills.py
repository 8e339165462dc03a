"""SIGKILL at random moments of real runs, then the same command again, until it ends: the file of an undisturbed run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest

from engine import refine
from engine.job import writer
from tests.engine.job.stub import Workplace, finish, start, timeless, wait

KILLS = 8
"""In each mode; seven modes make more than fifty."""
ROWS = 48
TOKENS = ("--max-new-tokens", "40")


@dataclass(frozen=True)
class Mode:
    """A way to run the command."""

    name: str
    options: tuple[str, ...] = TOKENS
    first: tuple[str, ...] = ()
    """Options of an earlier run, which is not disturbed."""
    output: str = "out.jsonl"
    piped: bool = False
    turns: bool = False

    def __str__(self) -> str:
        return self.name


MODES = [
    Mode("ordered"),
    Mode("unordered", (*TOKENS, "--unordered")),
    Mode("sampled", (*TOKENS, "--temperature", "0.9", "--top-p", "0.95", "--seed", "3")),
    Mode("array", output="out.json"),
    Mode("piped", piped=True),
    Mode("turns", turns=True),
    Mode("retried", (*TOKENS, "--retry-errors"), (*TOKENS, "--kv-cache-tokens", "128")),
]


def rows(mode: Mode) -> str:
    dice, lines = random.Random(str(mode)), []
    for i in range(ROWS):
        draft = "".join(dice.choices("abcdef ", k=dice.randint(0, 60)))
        prompt = f"question {i} " + "x" * dice.choice([0, 5, 70])
        if mode.turns:
            lines.append({"id": i, "turns": [prompt] * dice.randint(1, 3), "drafts": [draft]})
        else:
            lines.append({"id": f"row {i}", "prompt": prompt, "draft": draft})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return text.replace("\n", "\nno row\n", 3)


@dataclass
class Runner:
    """Runs the real command in children of this process, which has imported everything already."""

    place: Workplace
    model: Path
    mode: Mode
    environment: dict[str, str] = field(default_factory=dict)

    def arguments(self, options: tuple[str, ...]) -> list[str]:
        source = "-" if self.mode.piped else str(self.place.input)
        return [
            "--model", str(self.model), "--input", source, "--output", str(self.place.output), "--max-batch-size", "6",
            *options,
        ]  # fmt: skip

    def start(self, options: tuple[str, ...] | None = None) -> int:
        arguments = self.arguments(self.mode.options if options is None else options)

        def run() -> int:
            with mock.patch.object(writer, "FLUSH_SECONDS", 0.02), mock.patch.dict(os.environ, self.environment):
                return refine.main(arguments)

        return start(run, self.place.log, self.place.input if self.mode.piped else None)

    def compared(self) -> bytes:
        result = self.place.result
        return b"".join(sorted(result.splitlines(True))) if "--unordered" in self.mode.options else result


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_killed_at_random_moments(mode: Mode, model: Path, tmp_path: Path) -> None:
    dice = random.Random(str(mode))
    reference = Runner(Workplace(tmp_path / "undisturbed", mode.output), model, mode)
    disturbed = Runner(Workplace(tmp_path / "disturbed", mode.output), model, mode)
    for runner in (reference, disturbed):
        runner.place.input.write_text(rows(mode))
        if mode.first:
            assert finish(runner.start(mode.first)) == 3, runner.place.said
    first = disturbed.compared() if mode.first else b""
    began = time.monotonic()
    assert finish(reference.start()) == 3, reference.place.said
    whole = time.monotonic() - began
    assert reference.compared().count(b'"index": ') == ROWS + 3
    assert reference.compared() != first

    kills, ends, seen = 0, 0, set()
    while kills < KILLS or not ends:
        child = disturbed.start()
        status = None
        if kills < KILLS:
            status = wait(child, dice.uniform(0.1, 0.9) * whole)
        if status is None and kills < KILLS:
            os.kill(child, signal.SIGKILL)
            assert wait(child) == -signal.SIGKILL
            kills += 1
            seen.add(sum(path.stat().st_size for path in disturbed.place.folder.glob("out*")))
            continue
        if status is None:
            status = finish(child)
        assert status == 3, disturbed.place.said
        assert disturbed.compared() == reference.compared()
        ends += 1
        if kills < KILLS:  # and once more from the beginning
            for path in disturbed.place.folder.glob("out*"):
                path.unlink()
            if mode.first:
                assert finish(disturbed.start(mode.first)) == 3
    assert disturbed.place.files() == reference.place.files()
    assert "Traceback" not in disturbed.place.said
    assert len(seen) > 2, f"the kills met too few states: {seen}"
