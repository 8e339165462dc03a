"""Every point between two operations on files at which a run can end: the same command again always completes the output."""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine.job.crash import CrashPoint, How, Killed
from tests.engine.job.stub import Workplace, indices

pytestmark = pytest.mark.usefixtures("no_fsync")

ROWS: list[object] = [
    {"id": "first", "prompt": "row 0", "draft": "a draft", "kept": [1, {"x": None}]},
    {"prompt": "row 1, unanswerable"},
    {"turns": ["row 2", "row 2 goes on"], "drafts": ["one"], "kept": True},
    "no row at all",
    {"prompt": "row 4, large", "draft": "d" * 30},
    {"prompt": "row 5", "draft": "e" * 11},
    {"prompt": "row 6 \u2028 \u00e4"},
]
SMALL, LARGE = ("--kv-cache-tokens", "512"), ("--kv-cache-tokens", "2048")


@dataclass(frozen=True)
class Scenario:
    """Commands that prepare a folder, then the command that ends early."""

    name: str
    options: tuple[str, ...] = ()
    before: tuple[tuple[str, ...], ...] = ()
    output: str = "out.jsonl"
    rows: int = len(ROWS)
    world: int = 0
    """Ranks of a data-parallel run; the last one ends early, or the first."""
    crashed_rank: int = -1

    def run(self, place: Workplace, options: tuple[str, ...]) -> list[int]:
        return [place.main(*options, rank=rank) for rank in self.ranks]

    def __str__(self) -> str:
        return self.name

    @property
    def chosen(self) -> list[object]:
        return ROWS[-self.rows :]

    @property
    def ranks(self) -> list[tuple[int, int] | None]:
        return [(rank, self.world) for rank in range(self.world)] or [None]


SCENARIOS = [
    Scenario("ordered", SMALL),
    Scenario("unordered", (*SMALL, "--unordered")),
    Scenario("array", SMALL, output="out.json"),
    Scenario("complete", SMALL, (SMALL,)),
    Scenario("retry", (*LARGE, "--retry-errors"), (SMALL,)),
    Scenario("retry-unordered", (*LARGE, "--unordered", "--retry-errors"), ((*SMALL, "--unordered"),)),
    Scenario("retry-array", (*LARGE, "--retry-errors"), (SMALL,), output="out.json"),
    Scenario("overwrite-same", (*SMALL, "--overwrite"), (SMALL,)),
    Scenario("overwrite-changed", (*SMALL, "--seed", "2", "--overwrite"), ((*SMALL, "--seed", "1"),)),
    Scenario("overwrite-array", (*SMALL, "--seed", "2", "--overwrite"), ((*SMALL, "--seed", "1"),), output="out.json"),
    Scenario("parallel-first", SMALL, world=2, crashed_rank=0),
    Scenario("parallel-last", SMALL, world=2, crashed_rank=1),
    Scenario("parallel-retry-first", (*LARGE, "--retry-errors"), (SMALL,), rows=3, world=2, crashed_rank=0),
    Scenario("parallel-retry-last", (*LARGE, "--retry-errors"), (SMALL,), rows=3, world=2, crashed_rank=1),
]  # fmt: skip


@dataclass
class Prepared:
    """A scenario's folder before the command, and what the command makes of it."""

    scenario: Scenario
    folder: Path
    result: bytes
    files: list[str]
    operations: list[str]

    def copy(self, name: str) -> Workplace:
        target = self.folder.with_name(name)
        shutil.copytree(self.folder, target)
        return Workplace(target, self.scenario.output)


def compared(place: Workplace, scenario: Scenario) -> bytes:
    return b"".join(sorted(place.result.splitlines(True))) if "--unordered" in scenario.options else place.result


def crash(place: Workplace, scenario: Scenario, at: int, how: How) -> tuple[int, list[str]]:
    """Runs the command, the chosen rank of it with a crash point; that one's exit status (-9: killed) and operations."""
    status, point = 0, CrashPoint(at, how)
    for rank in scenario.ranks:
        if rank is None or rank[0] == scenario.crashed_rank:
            try:
                with point.installed():
                    status = place.main(*scenario.options, rank=rank)
            except Killed:
                status = -9
        else:
            assert place.main(*scenario.options, rank=rank) in (0, 3)
    return status, point.done


@pytest.fixture(scope="module", params=SCENARIOS, ids=str)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    scenario: Scenario = request.param
    base = tmp_path_factory.mktemp(scenario.name)
    place = Workplace(base / "before", scenario.output)
    place.input.write_text(
        "\n".join(json.dumps(row) if isinstance(row, dict) else str(row) for row in scenario.chosen) + "\n"
    )
    for options in scenario.before:
        scenario.run(place, options)
        assert indices(place.result) == list(range(len(scenario.chosen))) or "--unordered" in options
    prepared = Prepared(scenario, place.folder, b"", [], [])
    reference = prepared.copy("reference")
    prepared.operations = crash(reference, scenario, 0, "nothing")[1]
    prepared.result, prepared.files = compared(reference, scenario), reference.files()
    assert sorted(indices(prepared.result)) == list(range(len(scenario.chosen)))
    assert prepared.files == [scenario.output, f"{scenario.output}.job"]
    return prepared


@pytest.mark.parametrize("how", ["killed", "killed halfway", "error", "interrupted"])
def test_the_same_command_again_completes_the_output(
    prepared: Prepared, how: How, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = prepared.scenario
    for at, operation in enumerate(prepared.operations, 1):
        if how == "killed halfway" and operation != "pwrite":
            continue
        place = prepared.copy(f"{how}-{at}")
        where = f"{how} at operation {at} of {prepared.operations}"
        status, _ = crash(place, scenario, at, how)
        said = capsys.readouterr().err
        if how.startswith("killed"):
            assert status == -9, where
        elif how == "error":
            assert status in (1, 2), where
            assert "Input/output error" in said, where
        else:
            assert status in (130, 0, 3), where
        statuses = [place.main(*scenario.options, rank=rank) for rank in scenario.ranks]
        assert set(statuses) <= {0, 3}, where
        assert compared(place, scenario) == prepared.result, where
        assert place.files() == prepared.files, where
        assert f'"complete": {scenario.rows},'.encode() in (place.folder / f"{scenario.output}.job").read_bytes(), where
        shutil.rmtree(place.folder)


@pytest.mark.parametrize("prepared", [s for s in SCENARIOS if "--overwrite" in s.options], indirect=True, ids=str)
@pytest.mark.parametrize("how", ["killed", "error"])
def test_a_crash_while_overwriting_never_passes_old_rows_off_as_new(prepared: Prepared, how: How) -> None:
    scenario = prepared.scenario
    without = tuple(option for option in scenario.options if option != "--overwrite")
    for at in range(1, len(prepared.operations) + 1):
        place = prepared.copy(f"without-{how}-{at}")
        crash(place, scenario, at, how)
        left = place.output.read_bytes()
        if place.main(*without) == 2:
            assert place.output.read_bytes() == left
        else:
            assert compared(place, scenario) == prepared.result, f"{how} at {at} of {prepared.operations}"


def test_many_crashes_one_after_the_other(prepared: Prepared) -> None:
    scenario, dice = prepared.scenario, random.Random(prepared.scenario.name)
    place = prepared.copy("many")
    for _ in range(25):
        at = dice.randint(1, len(prepared.operations))
        crash(place, scenario, at, dice.choice(["killed", "error", "interrupted"]))
    assert {place.main(*scenario.options, rank=rank) for rank in scenario.ranks} <= {0, 3}
    assert compared(place, scenario) == prepared.result
    assert place.files() == prepared.files
