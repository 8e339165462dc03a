"""SIGKILL at random moments of real runs, then the same command again, until it ends: the file of an undisturbed run."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from engine import refine
from engine.job import writer
from tests.engine.job.stub import Workplace, finish, indices, start, wait

KILLS = 8
"""In each mode; seven modes make more than fifty."""
ROWS = 36
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
        prompt = f"question {i} " + "x" * dice.choice([0, 5, 120])
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

    def arguments(self, options: tuple[str, ...]) -> list[str]:
        source = "-" if self.mode.piped else str(self.place.input)
        return [
            "--model", str(self.model), "--input", source, "--output", str(self.place.output), "--max-batch-size", "6",
            *options,
        ]  # fmt: skip

    def start(self, options: tuple[str, ...] | None = None) -> int:
        arguments = self.arguments(self.mode.options if options is None else options)

        def run() -> int:
            with mock.patch.object(writer, "FLUSH_SECONDS", 0.02):
                return refine.main(arguments)

        return start(run, self.place.log, self.place.input if self.mode.piped else None)

    def prepare(self) -> None:
        """Input and earlier output, as before the run that is disturbed."""
        for path in self.place.folder.glob("out*"):
            path.unlink()
        self.place.input.write_text(rows(self.mode))
        if self.mode.first:
            assert finish(self.start(self.mode.first)) == 3, self.place.said

    def compared(self) -> bytes:
        result = self.place.result
        return b"".join(sorted(result.splitlines(True))) if "--unordered" in self.mode.options else result


def written(place: Workplace) -> int:
    """Bytes of the output and of all that lies beside it."""
    size = 0
    for path in place.folder.glob("out*"):
        with contextlib.suppress(FileNotFoundError):  # it may just be removed
            size += path.stat().st_size
    return size


def wait_until_written(child: int, place: Workplace, size: int) -> int | None:
    """Exit status of a child; None once it has written that many bytes more."""
    least = written(place) + size
    while written(place) < least:
        status = wait(child, 0)
        if status is not None:
            return status
    return None


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_killed_at_random_moments(mode: Mode, model: Path, tmp_path: Path) -> None:
    dice = random.Random(str(mode))
    reference = Runner(Workplace(tmp_path / "undisturbed", mode.output), model, mode)
    disturbed = Runner(Workplace(tmp_path / "disturbed", mode.output), model, mode)
    reference.prepare()
    disturbed.prepare()
    first = reference.compared() if mode.first else b""
    began = time.monotonic()
    assert finish(reference.start()) == 3, reference.place.said
    whole = time.monotonic() - began
    assert reference.compared().count(b'"index": ') == ROWS + 3
    assert reference.compared() != first

    kills, ended, seen = 0, False, set()
    while kills < KILLS or not ended:
        if ended:  # before all kills were due: from the beginning
            disturbed.prepare()
        child = disturbed.start()
        if kills == KILLS:
            status: int | None = finish(child)
        elif kills % 2:
            status = wait(child, dice.uniform(0.1, 0.9) * whole)
        else:  # by its progress, so that also on a busy machine the kills meet it at work
            status = wait_until_written(child, disturbed.place, dice.randint(1, 2500))
        if status is None:
            os.kill(child, signal.SIGKILL)
            status = finish(child)
        ended = status != -signal.SIGKILL
        if ended:
            assert status == 3, disturbed.place.said
            assert disturbed.compared() == reference.compared()
        else:
            kills += 1
            seen.add(written(disturbed.place))
    assert disturbed.place.files() == reference.place.files()
    assert "Traceback" not in disturbed.place.said
    assert len(seen) > 2, f"the kills met too few states: {seen}"


@pytest.mark.slow
def test_processes_of_their_own_killed(model: Path, tmp_path: Path) -> None:
    """``python -m engine.refine`` itself, killed while it loads, then while it writes."""
    mode = Mode("processes", ("--max-new-tokens", "12"))
    runner = Runner(Workplace(tmp_path), model, mode)
    runner.place.input.write_text("".join(json.dumps({"prompt": f"row {i}" * 9}) + "\n" for i in range(2000)))
    command = [sys.executable, "-m", "engine.refine", *runner.arguments(mode.options)]
    record = tmp_path / "out.jsonl.job"
    for least in (-1, 60_000):
        with (tmp_path / "log").open("ab") as log, subprocess.Popen(command, stderr=log) as process:
            deadline = time.monotonic() + 240
            while process.poll() is None and time.monotonic() < deadline:
                size = runner.place.output.stat().st_size if runner.place.output.exists() else 0
                if record.exists() if least < 0 else size > least:
                    break
                time.sleep(0.002)
            process.kill()
            assert process.wait() == -signal.SIGKILL, runner.place.said
    assert runner.place.output.stat().st_size > 60_000
    assert len(indices(runner.place.output.read_bytes())) < 2000
    assert finish(runner.start()) == 0
    disturbed = runner.place.result
    for path in tmp_path.glob("out*"):
        path.unlink()
    assert finish(runner.start()) == 0
    assert runner.place.result == disturbed
    assert "are finished already" in runner.place.said
    assert indices(disturbed) == list(range(2000))
