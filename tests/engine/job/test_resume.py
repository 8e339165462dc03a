"""The same command again: finished rows stay, torn ones are repaired, and the file is that of an undisturbed run."""

import json
import random
import re
import signal
from collections import Counter
from pathlib import Path

import pytest

from engine.request import Result
from tests.engine.job.stub import StubSession, Workplace, indices, write

pytestmark = pytest.mark.usefixtures("no_fsync")

ROWS = [
    {"id": f"id {i}", "prompt": f"row {i}", "draft": "d" * (i * 7 % 11), "note": {"ä": [i, None]}} for i in range(12)
]


def fill(place: Workplace, rows: list[dict[str, object]] | None = None) -> Workplace:
    write(place, rows or ROWS)
    return place


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = fill(Workplace(tmp_path_factory.mktemp("undisturbed")))
    assert place.main() == 0
    assert Counter(place.asked) == Counter(str(row["prompt"]) for row in ROWS)
    return place


def reopened(place: Workplace) -> None:
    """As if the run had not ended."""
    record = place.folder / f"{place.output.name}.job"
    record.write_bytes(record.read_bytes().partition(b"\n")[0] + b"\n")


@pytest.mark.parametrize("ended", [True, False], ids=["record complete", "record open"])
def test_cut_at_every_byte_of_the_last_lines(undisturbed: Workplace, tmp_path: Path, ended: bool) -> None:
    whole = undisturbed.output.read_bytes()
    lines = whole.splitlines(True)
    place = fill(Workplace(tmp_path))
    record = (undisturbed.folder / "out.jsonl.job").read_bytes()
    for size in [*range(len(whole) - len(b"".join(lines[-2:])), len(whole) + 1), *range(40)]:
        (place.folder / "out.jsonl.job").write_bytes(record)
        if not ended:
            reopened(place)
        place.output.write_bytes(whole[:size])
        place.asked_file.unlink(missing_ok=True)
        assert place.main() == 0
        assert place.result == undisturbed.result, size
        finished = whole[:size].count(b"\n")
        assert place.asked == [row["prompt"] for row in ROWS[finished:]], size
        assert place.output.read_bytes().startswith(b"".join(lines[:finished])), "finished rows are kept, timings too"


def test_a_complete_output_is_left_alone(undisturbed: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    before, asked = undisturbed.output.stat(), len(undisturbed.asked)
    for _ in range(2):
        assert undisturbed.main() == 0
    after = undisturbed.output.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    assert len(undisturbed.asked) == asked
    assert "nothing left to do: 12 rows, 0 errors" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(3))
def test_unordered_rows_missing_anywhere(undisturbed: Workplace, tmp_path: Path, seed: int) -> None:
    place = fill(Workplace(tmp_path))
    assert place.main("--unordered") == 0
    lines = place.output.read_bytes().splitlines(True)
    assert sorted(indices(place.result)) == list(range(len(ROWS)))
    whole = sorted(place.result.splitlines(True))
    dice = random.Random(seed)
    kept = sorted(dice.sample(range(len(lines)), 5))
    torn = lines[kept[-1] - 1][: dice.randint(1, 30)]
    place.output.write_bytes(b"".join(lines[i] for i in kept) + torn)
    reopened(place)
    place.asked_file.unlink()
    assert place.main("--unordered") == 0
    assert sorted(place.result.splitlines(True)) == whole
    found = indices(b"".join(lines[i] for i in kept))
    assert Counter(place.asked) == Counter(f"row {i}" for i in range(len(ROWS)) if i not in found)
    assert place.output.read_bytes().startswith(b"".join(lines[i] for i in kept))


def test_turns_are_asked_again_only_for_unfinished_rows(tmp_path: Path) -> None:
    rows = [{"turns": [f"row {i} turn {t}" for t in range(1 + i % 3)], "drafts": [f"draft {i}"]} for i in range(7)]
    place = fill(Workplace(tmp_path), rows)
    assert place.main() == 0
    whole, result = place.output.read_bytes(), place.result
    assert "row 2 turn 0+[row 2 turn 0] from draft 2 é+row 2 turn 1" in whole.decode(), "the refined answer is history"
    place.output.write_bytes(b"".join(whole.splitlines(True)[:4]) + b'{"torn')
    place.asked_file.unlink()
    assert place.main() == 0
    assert place.result == result
    assert sorted(place.asked) == sorted(turn for row in rows[4:] for turn in row["turns"])


def test_retried_errors_are_asked_again_and_no_other_row(tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": f"row {i}" + (", large" if i % 3 == 0 else "")} for i in range(9)]
    rows[4] = {"id": 4, "prompt": "row 4, unanswerable"}
    place = fill(Workplace(tmp_path), rows)
    assert place.main("--kv-cache-tokens", "512") == 3
    first = [json.loads(line) for line in place.output.read_bytes().splitlines()]
    assert [row["index"] for row in first if row["error"]] == [0, 3, 4, 6]
    place.asked_file.unlink()
    assert place.main("--kv-cache-tokens", "2048", "--retry-errors") == 3
    again = [json.loads(line) for line in place.output.read_bytes().splitlines()]
    assert sorted(place.asked) == ["row 0, large", "row 3, large", "row 4, unanswerable", "row 6, large"]
    assert [row["index"] for row in again] == list(range(9))
    assert [row["index"] for row in again if row["error"]] == [4]
    assert [row for row in again if row["index"] not in (0, 3, 4, 6)] == [row for row in first if not row["error"]]


@pytest.mark.parametrize("levels", [20, 500, *range(940, 1000, 3)])
def test_rows_nested_as_deep_as_can_be_written_can_be_read_again(tmp_path: Path, levels: int) -> None:
    place = fill(Workplace(tmp_path))
    deep = '{"prompt": "row 0", "deep": ' + "[" * levels + "]" * levels + "}\n"
    place.input.write_text(deep + json.dumps(ROWS[1]) + "\n")
    assert place.main() in (0, 3)
    result = place.result
    place.output.write_bytes(place.output.read_bytes()[:-5])
    assert place.main() in (0, 3)
    assert re.sub(rb"[\[\]]+", b"", place.result) == re.sub(rb"[\[\]]+", b"", result)
    assert indices(place.result) == [0, 1]


@pytest.mark.parametrize("interrupts", [1, 2])
def test_rows_finished_behind_an_unfinished_one_are_kept_when_interrupted(
    interrupts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 0 takes seven steps of the stub, the others one."""
    rows: list[dict[str, object]] = [{"prompt": f"row {i}", "draft": "d" * (6 if i else 5)} for i in range(10)]
    (tmp_path / "whole").mkdir()
    whole = fill(Workplace(tmp_path / "whole"), rows)
    assert whole.main() == 0
    (tmp_path / "cut").mkdir()
    place = fill(Workplace(tmp_path / "cut"), rows)
    step, steps = StubSession.step, []

    def interrupted_step(session: StubSession) -> list[Result]:
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(session)

    for _ in range(interrupts):
        steps.clear()
        with monkeypatch.context() as patch:
            patch.setattr(StubSession, "step", interrupted_step)
            assert place.main() == 130
        assert place.output.read_bytes() == b""
        assert "behind unfinished ones set aside" in capsys.readouterr().err
    assert place.main() == 0
    assert place.result == whole.result
    assert place.files() == ["out.jsonl", "out.jsonl.job"]
    asked = Counter(place.asked)
    assert asked.pop("row 0") == interrupts + 1
    assert set(asked) == {f"row {i}" for i in range(1, 10)}
    assert sum(asked.values()) == 9, "what was finished is not asked again"
