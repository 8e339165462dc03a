"""What else can go wrong around an output: each is a clear message and an exit status, and no row is lost."""

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.engine.job.crash import CrashPoint
from tests.engine.job.stub import StubSession, Workplace, finish, half_done, start, timeless, wait, write

pytestmark = pytest.mark.usefixtures("no_fsync")
ROWS: list[dict[str, Any]] = [{"id": f"id {i}", "prompt": f"row {i}", "draft": "d" * (i * 7 % 11)} for i in range(30)]


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    made = Workplace(tmp_path / "place")
    write(made, ROWS)
    return made


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The output of an undisturbed run, without timings."""
    made = Workplace(tmp_path_factory.mktemp("undisturbed"))
    write(made, ROWS)
    assert made.main() == 0
    return made.result


def at_row(row: int, action: Callable[[], None]) -> Any:
    """Does something when the stub is asked for a row, in the middle of the run."""
    add = StubSession.add

    def watched(self: StubSession, value: Any, index: int) -> Any:
        if value.prompt == f"row {row}":
            action()
        return add(self, value, index)

    return mock.patch.object(StubSession, "add", watched)


def with_limited_files(place: Workplace, size: int, *options: str) -> int:
    """The command in a child whose files cannot grow beyond ``size``: writing fails half done, as on a full disk."""

    def run() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        log = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        reader, pipe = os.pipe()  # messages do not count
        os.dup2(pipe, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        place.asked_file = place.folder / "missing" / "asked"
        with mock.patch("tests.engine.job.stub.StubRefiner.note"):
            status = place.main(*options)
        sys.stderr.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.write(log, os.read(reader, 1 << 16))
        return status

    asked = place.asked_file
    try:
        return finish(start(run, place.log))
    finally:
        place.asked_file = asked


@pytest.mark.parametrize("size", [10, 300, 700, 2000, 3333, 5000])
@pytest.mark.parametrize("output", ["out.jsonl", "out.json"])
def test_full_disk(tmp_path: Path, result: bytes, size: int, output: str) -> None:
    place = Workplace(tmp_path / "place", output)
    write(place, ROWS)
    assert with_limited_files(place, size) == 1, place.said
    assert "File too large" in place.said
    assert "Traceback" not in place.said
    for path in place.folder.glob("out*"):
        text = path.read_bytes()
        assert text.endswith(b"\n") or not text, "whole lines only"
        assert path.suffix == ".job" or timeless(text) in result, path
    assert place.main() == 0
    if output == "out.jsonl":
        assert place.result == result
    else:
        rows = json.loads(place.output.read_bytes())
        assert [row["index"] for row in rows] == list(range(len(ROWS)))
    assert place.files() == [output, f"{output}.job"]


def test_output_folder_removed_while_running(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    place.output = place.folder / "results" / "out.jsonl"
    place.output.parent.mkdir()
    with at_row(15, lambda: shutil.rmtree(place.output.parent)):
        assert place.main() == 1
    said = capsys.readouterr().err
    assert f"{place.output} was removed or replaced while it was written" in said
    assert "Traceback" not in said
    assert not place.output.parent.exists()


@pytest.mark.parametrize("row", [0, 1, 15, 29])
def test_output_replaced_while_running(
    place: Workplace, result: bytes, row: int, capsys: pytest.CaptureFixture[str]
) -> None:
    other = place.folder / "other"
    other.write_bytes(b"another file\n")
    with at_row(row, lambda: os.replace(other, place.output)):
        assert place.main() == 1
    assert "was removed or replaced while it was written" in capsys.readouterr().err
    assert place.output.read_bytes() == b"another file\n"


@pytest.mark.parametrize("row", [1, 29])
def test_record_removed_while_running(place: Workplace, row: int, capsys: pytest.CaptureFixture[str]) -> None:
    with at_row(row, lambda: os.unlink(place.folder / "out.jsonl.job")):
        assert place.main() == 1
    assert "out.jsonl.job was removed while rows were written" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    place.folder.chmod(0o555)
    try:
        assert place.main() == 2
    finally:
        place.folder.chmod(0o755)
    assert "Permission denied" in capsys.readouterr().err


def test_no_permission_to_write_beside_the_output(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    left = half_done(place)

    def refused(path: Any, flags: int, *mode: int, **options: Any) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    with mock.patch.object(os, "open", refused):
        assert place.main() == 2
    assert "cannot write beside" in capsys.readouterr().err
    assert place.output.read_bytes() == left


@pytest.mark.parametrize("size", [None, 0, 1, 100, -1])
def test_record_torn_or_deleted(
    place: Workplace, result: bytes, size: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    left = half_done(place)
    record = place.folder / "out.jsonl.job"
    if size is None:
        record.unlink()
    else:
        record.write_bytes(record.read_bytes()[:size])
    if size == -1:  # only its line end is missing
        assert place.main() == 0
    else:
        assert place.main() == 2
        assert "there is no record of how it was made" in capsys.readouterr().err
        assert place.output.read_bytes() == left
        assert place.main("--overwrite") == 0
    assert place.result == result
    assert record.read_bytes().count(b"\n") == 2


def test_second_process_on_one_output(place: Workplace, result: bytes) -> None:
    """The first one is stopped before each of its operations on files in turn."""
    operations = CrashPoint(0, "nothing")
    with operations.installed():
        assert place.main() == 0
    refused = 0
    for at in range(1, len(operations.done) + 1):
        for path in place.folder.glob("out*"):
            path.unlink()

        def run(at: int = at) -> int:
            with CrashPoint(at, "paused").installed():
                return place.main()

        first = start(run, place.log)
        _, status = os.waitpid(first, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        try:
            second = place.run()
            if at > 1 and second == 2:
                assert "another process is writing" in place.said.splitlines()[-1]
                refused += 1
        finally:
            os.kill(first, signal.SIGCONT)
            status = wait(first)
        assert (status, second) in {(0, 2), (0, 0)}, f"{at} of {operations.done}: {place.said}"
        assert place.result == result
        assert place.files() == ["out.jsonl", "out.jsonl.job"]
    assert refused == len(operations.done) - 1
