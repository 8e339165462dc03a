"""A refiner that answers at once and writes down what it was asked, and children that run the command with it."""

import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

from engine import RefineOptions, Refiner, refine
from engine.errors import InvalidRequest, RequestTooLong
from engine.job import writer
from engine.request import Request, Result

DEADLINE = 120.0
"""Seconds after which a child counts as hanging; generous, for a loaded machine."""
LARGE_TOKENS = 1000
"""A stub with fewer KV tokens refuses prompts that say so."""


class StubSession:
    """Answers depend on the request alone; how many steps they take puts them out of order."""

    def __init__(self, refiner: "StubRefiner", options: RefineOptions) -> None:
        self.refiner, self.options = refiner, options
        self.waiting: list[tuple[int, int, Request]] = []

    @property
    def has_room(self) -> bool:
        return len(self.waiting) < self.refiner.max_batch_size

    def add(self, value: Request, index: int) -> Result | None:
        text = value.prompt or (value.messages or [{"content": ""}])[-1]["content"]
        self.refiner.note(text)
        if "unanswerable" in text:
            return Result(id=value.id, index=index, error=InvalidRequest(f"{text!r} has no answer"))
        if "large" in text and self.refiner.kv_cache_tokens < LARGE_TOKENS:
            return Result(id=value.id, index=index, error=RequestTooLong(f"{text!r} does not fit"))
        self.waiting.append((len(answer(value)) % 7 + 1, index, value))
        return None

    def step(self) -> list[Result]:
        self.waiting = [(left - 1, index, value) for left, index, value in self.waiting]
        done = [(index, value) for left, index, value in self.waiting if left == 0]
        self.waiting = [entry for entry in self.waiting if entry[0]]
        return [self._result(index, value) for index, value in done]

    def _result(self, index: int, value: Request) -> Result:
        text = answer(value)
        return Result(
            id=value.id, index=index, text=text, token_ids=list(text.encode()), steps=len(text) % 7 + 1, converged=True,
            forward_tokens=len(text), finish_reason="eos", seconds=time.monotonic() % 1,
        )  # fmt: skip

    def close(self) -> None:
        pass


class StubRefiner:
    """What a job needs of a ``Refiner``; every request becomes a line of the file ``asked``."""

    def __init__(self, kv_cache_tokens: int = 16384, max_batch_size: int = 4, asked: Path | None = None) -> None:
        self.kv_cache_tokens, self.max_batch_size, self.asked = kv_cache_tokens, max_batch_size, asked

    def note(self, text: str) -> None:
        if self.asked:
            with self.asked.open("a") as file:
                file.write(text + "\n")

    def session(self, options: RefineOptions) -> StubSession:
        return StubSession(self, options)

    def close(self) -> None:
        pass


def answer(value: Request) -> str:
    """The stub's answer: a function of history, prompt and draft."""
    history = "+".join(message["content"] for message in value.messages or [])
    return f"[{history or value.prompt}] from {value.draft} é"


@contextmanager
def stubbed(asked: Path | None = None) -> Iterator[None]:
    """The command loads a StubRefiner, and every row goes to disk by itself."""

    @wraps(Refiner.from_pretrained)
    def load(path: object, **options: Any) -> StubRefiner:
        return StubRefiner(options["kv_cache_tokens"], options["max_batch_size"], asked)

    with (
        mock.patch.object(Refiner, "from_pretrained", load),
        mock.patch.object(writer, "FLUSH_SECONDS", -1.0),
    ):
        yield


def timeless(text: bytes) -> bytes:
    """An output without its timings."""
    return re.sub(rb'"seconds": [0-9.e+-]+', b'"seconds": 0', text)


def start(call: Callable[[], int], log: Path, stdin: Path | None = None) -> int:
    """Starts ``call`` in a forked child whose standard output and error go to the end of ``log``; its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        if stdin:
            os.dup2(os.open(stdin, os.O_RDONLY), 0)
        status = call()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(pid: int, seconds: float = DEADLINE) -> int | None:
    """Exit status of a child, minus the signal that ended it; None: it has not ended."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.001)


def finish(pid: int) -> int:
    """Exit status of a child that has to end by itself."""
    status = wait(pid)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        raise AssertionError("the child hangs")
    return status


class Workplace:
    """A folder with an input, an output and the command that leads from one to the other."""

    def __init__(self, folder: Path, output: str = "out.jsonl") -> None:
        self.folder, self.output = folder, folder / output
        self.input, self.log, self.asked_file = folder / "in.jsonl", folder / "log", folder / "asked"
        model = folder / "model"
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text("{}")

    def arguments(self, *options: str) -> list[str]:
        """The command line; later ``options`` win."""
        return [
            "--model", str(self.folder / "model"), "--input", str(self.input), "--output", str(self.output),
            "--max-batch-size", "4", *options,
        ]  # fmt: skip

    def main(self, *options: str, rank: tuple[int, int] | None = None) -> int:
        """Runs the command with the stub in this process."""
        environment = {"RANK": str(rank[0]), "WORLD_SIZE": str(rank[1])} if rank else {}
        with stubbed(self.asked_file), mock.patch.dict(os.environ, environment):
            return refine.main(self.arguments(*options, *(["--data-parallel"] if rank else [])))

    def run(self, *options: str, rank: tuple[int, int] | None = None) -> int:
        """The same in a child."""
        return finish(start(lambda: self.main(*options, rank=rank), self.log))

    @property
    def result(self) -> bytes:
        return timeless(self.output.read_bytes())

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def asked(self) -> list[str]:
        """What stubs were asked so far."""
        return self.asked_file.read_text().splitlines() if self.asked_file.exists() else []

    def files(self) -> list[str]:
        """What lies beside the input, but for the tests' own files."""
        own = {self.input.name, self.log.name, self.asked_file.name, "model"}
        return sorted(path.name for path in self.folder.iterdir() if path.name not in own)


def indices(output: bytes) -> Sequence[int]:
    """The rows of an output, by their index."""
    return [int(found) for found in re.findall(rb'"index": (\d+)', output)]


def write(place: Workplace, rows: list[dict[str, Any]]) -> None:
    place.input.write_text("".join(json.dumps(row) + "\n" for row in rows))


def half_done(place: Workplace) -> bytes:
    """Leaves the output of a run that was killed in the middle; its bytes."""
    assert place.main() == 0
    whole = place.output.read_bytes()
    record = place.folder / "out.jsonl.job"
    record.write_bytes(record.read_bytes().partition(b"\n")[0] + b"\n")
    place.output.write_bytes(whole[: whole.index(b'"index": 17') + 20])
    return place.output.read_bytes()
