"""Every point between two operations on files at which a build can end: the same command again always completes it."""

import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from engine.trajectories import build
from engine.trajectories.endpoint import Answer, EndpointError
from tests.engine.job.crash import CrashPoint, How, Killed
from tests.engine.trajectories.helpers import call, read, write

PROMPTS: list[dict[str, Any] | bytes] = [
    {"prompt_id": "p0", "prompt": "first", "responses": [{"model": "small", "text": "known", "reward": 1.0}]},
    b"no row at all",
    {"prompt_id": "p2", "prompt": "refused at first"},
    {"prompt_id": "p3", "prompt": "the same answer"},
    {"prompt_id": "p4", "prompt": "last \u2028 \u00e4"},
]
ASKED = 7
"""Answers wanted: of two models to four prompts, one of which is there."""


class Endpoint:
    """What a build needs of one; it answers at once and counts."""

    asked: ClassVar[Counter[tuple[str, str]]] = Counter()
    refuses = False

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def ask(self, model: str, messages: list[dict[str, str]], _: Any, seed: int) -> Answer:
        prompt = messages[-1]["content"]
        self.asked[model, prompt] += 1
        if self.refuses and "refused" in prompt:
            raise EndpointError("not now")
        return Answer(text="same" if "same" in prompt else f"{model} on {prompt} by {seed}", truncated=False)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Scenario:
    """A command that prepares a folder, if any, then the command that ends early."""

    name: str
    options: tuple[str, ...] = ()
    before: tuple[str, ...] | None = None
    refuses: bool = False
    """Whether one prompt is refused, by the second command too."""

    def __str__(self) -> str:
        return self.name


SCENARIOS = [
    Scenario("whole"),
    Scenario("with errors", refuses=True),
    Scenario("complete", before=()),
    Scenario("errors gone", ("--retry-errors",), ()),
    Scenario("overwrite changed", ("--seed", "2", "--overwrite"), ("--seed", "1")),
]


@dataclass
class Prepared:
    """A scenario's folder before the command, what was in it, and what the command makes of it."""

    scenario: Scenario
    folder: Path
    old: bytes | None = None
    result: bytes = b""
    files: list[str] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.folder, self.folder.with_name(name)))


def command(folder: Path, options: tuple[str, ...]) -> int:
    models = ["--endpoint", "http://nowhere", "--model", "small", "--model", "large", "--concurrency", 1]
    return call("build", "--prompts", folder / "prompts.jsonl", "--output", folder / "out.jsonl", *models, *options)


def crash(folder: Path, options: tuple[str, ...], at: int, how: How) -> tuple[int, list[str]]:
    """Exit status (-9: killed) and the operations so far; a line made is a line written, behind Python's buffers."""
    point = CrashPoint(at, how, [(build, "encode"), (Path, "write_bytes")])
    try:
        with point.installed():
            return command(folder, options), point.done
    except Killed:
        return -9, point.done


@pytest.fixture(autouse=True)
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "Endpoint", Endpoint)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # what ends here is a process, not the machine


@pytest.fixture(params=SCENARIOS, ids=str)
def prepared(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    scenario: Scenario = request.param
    made = Prepared(scenario, tmp_path / "before")
    made.folder.mkdir()
    write(made.folder / "prompts.jsonl", PROMPTS)
    if scenario.before is not None:
        monkeypatch.setattr(Endpoint, "refuses", scenario.name == "errors gone")
        assert command(made.folder, scenario.before) == 3
        made.old = (made.folder / "out.jsonl").read_bytes()
    monkeypatch.setattr(Endpoint, "refuses", scenario.refuses)
    reference = made.copy("reference")
    status, made.operations = crash(reference, scenario.options, 0, "nothing")
    assert status == 3  # the bad row
    made.result = (reference / "out.jsonl").read_bytes()
    made.files = sorted(path.name for path in reference.iterdir())
    assert made.files == [
        "out.jsonl", "out.jsonl.errors", "out.jsonl.responses", "out.jsonl.responses.job", "prompts.jsonl"
    ]  # fmt: skip
    assert [len(row["responses"]) for row in read(reference / "out.jsonl")] == (
        [2, 1, 2] if scenario.refuses else [2, 2, 1, 2]
    )
    return made


@pytest.mark.parametrize("how", ["killed", "killed halfway", "error", "interrupted"])
def test_the_same_command_again_completes_the_output(
    prepared: Prepared, how: How, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = prepared.scenario
    for at, operation in enumerate(prepared.operations, 1):
        if how == "killed halfway" and operation != "pwrite":
            continue
        folder, where = prepared.copy(f"{how}-{at}"), f"{how} at operation {at} of {prepared.operations}"
        Endpoint.asked.clear()
        status, _ = crash(folder, scenario.options, at, how)
        said, out = capsys.readouterr().err, folder / "out.jsonl"
        assert status in {"error": (1, 2), "interrupted": (130, 3)}.get(how, (-9,)), where
        assert how != "error" or "Input/output error" in said, where
        assert (out.read_bytes() if out.exists() else None) in (prepared.old, prepared.result), where
        # --overwrite once more would start anew, as it says; the others go on
        again = tuple(option for option in scenario.options if option != "--overwrite")
        begun = command(folder, again)
        assert begun in (2, 3), where
        if begun == 2:  # it ended before anything was overwritten
            assert "--overwrite" in scenario.options, where
            assert out.read_bytes() == prepared.old, where
            assert command(folder, scenario.options) == 3, where
        assert out.read_bytes() == prepared.result, where
        assert sorted(path.name for path in folder.iterdir()) == prepared.files, where
        assert (folder / "out.jsonl.responses").read_bytes().count(b"\n") == ASKED, where
        # an answer is asked for twice only where the first was not on disk yet
        assert sum(Endpoint.asked.values()) <= len(Endpoint.asked) + 1, where
        shutil.rmtree(folder)
