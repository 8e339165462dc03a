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
from tests.engine.job.stub import StubSession, Workplace, finish, indices, start, timeless, wait

ROWS: list[dict[str, Any]] = [{"id": f"id {i}", "prompt": f"row {i}", "draft": "d" * (i * 7 % 11)} for i in range(30)]

FOREIGN = [
    b"hello\n",
    b'{"id": 1, "text": "of another program"}\n',
    b"\x00\xff",
    b"[1, 2]",
    b'{"index": 0, "error": null}\n',
]
DAMAGED = [
    b"garbage\n",
    b'{"id": "id 5", "index": 5\n',
    b"\n",
    b"\xff\xfe\n",
    b'{"index": -1, "error": null}\n',
    b'{"index": true, "error": null}\n',
]


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "1"], "options seed 0, now 1"),
        (["--max-new-tokens", "9"], "options max_new_tokens 256, now 9"),
        (["--temperature", "0.5", "--top-p", "0.5"], "temperature 0.0, now 0.5"),
        (["--token-ids"], "output token_ids False, now True"),
        (["--unordered"], "output order 'input', now 'as finished'"),
        (["--dtype", "bfloat16"], "model dtype 'float32', now 'bfloat16'"),
    ],
)
def test_changed_options(
    place: Workplace, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    left = half_done(place)
    asked = len(place.asked)
    assert place.main(*options) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("engine.refine: error: ")
    assert message in said
    assert "--overwrite" in said
    assert place.output.read_bytes() == left
    assert len(place.asked) == asked


@pytest.mark.parametrize("output", ["out.jsonl", "out.json"])
def test_changed_model_and_input(tmp_path: Path, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = Workplace(tmp_path / "place", output)
    write(place, ROWS)
    assert place.main() == 0
    left = place.output.read_bytes()
    (place.folder / "model" / "config.json").write_text('{"another": 1}')
    assert place.main() == 2
    assert "another content of the model" in capsys.readouterr().err
    (place.folder / "model" / "config.json").write_text("{}")
    write(place, ROWS[:-1])
    assert place.main() == 2
    assert "another content of the input" in capsys.readouterr().err
    assert place.output.read_bytes() == left
    write(place, ROWS)
    assert place.main() == 0
    assert place.output.read_bytes() == left


@pytest.mark.parametrize(("output", "complete"), [("out.jsonl", True), ("out.jsonl", False), ("out.json", True)])
def test_other_rows_from_the_pipe(tmp_path: Path, output: str, complete: bool) -> None:
    place = Workplace(tmp_path / "place", output)

    def run(rows: list[dict[str, Any]]) -> int:
        write(place, rows)
        return finish(start(lambda: place.main("--input", "-"), place.log, place.input))

    assert run(ROWS) == 0
    whole = place.output.read_bytes()
    if not complete:
        record = place.folder / f"{output}.job"
        record.write_bytes(record.read_bytes().partition(b"\n")[0] + b"\n")
        place.output.write_bytes(whole[: whole.index(b'"index": 17') + 20])
    left = place.output.read_bytes()
    for changed in ([{**ROWS[0], "id": "other"}, *ROWS[1:]], ROWS[:3], [{**ROWS[0], "more": 1}, *ROWS[1:]]):
        asked = len(place.asked)
        assert run(changed) == 2, place.said
        assert len(place.asked) == asked
        assert place.output.read_bytes() == left
    assert "row 0 of - is not the row that" in place.said
    assert f"{place.output} has more rows than -" in place.said
    if output == "out.json":
        assert run([*ROWS, ROWS[0]]) == 2
        assert f"- has more rows than {place.output}" in place.said
    assert run(ROWS) == 0
    assert indices(place.result) == list(range(len(ROWS)))


@pytest.mark.parametrize("content", FOREIGN)
@pytest.mark.parametrize("output", ["out.jsonl", "out.json"])
def test_foreign_file_as_output(
    tmp_path: Path, content: bytes, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Workplace(tmp_path / "place", output)
    write(place, ROWS)
    place.output.write_bytes(content)
    for options in ([], ["--retry-errors"]):
        assert place.main(*options) == 2
        assert "there is no record of how it was made" in capsys.readouterr().err
        assert place.output.read_bytes() == content
        assert place.files() == [output]
    assert place.main("--overwrite") == 0
    assert indices(place.result) == list(range(len(ROWS)))


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_line_in_the_middle(place: Workplace, damage: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    half_done(place)
    lines = place.output.read_bytes().splitlines(True)
    lines[5] = damage
    left = b"".join(lines)
    place.output.write_bytes(left)
    asked = len(place.asked)
    assert place.main() == 2
    assert f"{place.output}, line 6, is not a row of this job's output" in capsys.readouterr().err
    assert place.output.read_bytes() == left
    assert len(place.asked) == asked


def test_output_is_the_input(place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = place.input.read_bytes()
    (place.folder / "hard.jsonl").hardlink_to(place.input)
    (place.folder / "soft.jsonl").symlink_to(place.input)
    for name in ("in.jsonl", "hard.jsonl", "soft.jsonl", "../place/in.jsonl"):
        assert place.main("--output", str(place.folder / name), "--overwrite") == 2
        assert "is the input" in capsys.readouterr().err
        assert place.input.read_bytes() == content


@pytest.mark.parametrize("name", ["in.jsonl", "out.jsonl", "missing/metrics.json", "model", "out.jsonl.job"])
def test_metrics_file_that_cannot_be_one(place: Workplace, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = place.input.read_bytes()
    assert place.main("--metrics-file", str(place.folder / name)) == 2
    assert "engine.refine: error: " in capsys.readouterr().err
    assert place.input.read_bytes() == content
    assert place.files() == []


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
