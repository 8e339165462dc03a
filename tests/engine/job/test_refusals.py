"""What a job refuses to start on: other options, models and inputs, files of others, damaged rows; nothing is changed."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine.job.stub import Workplace, finish, half_done, indices, start, write

pytestmark = pytest.mark.usefixtures("no_fsync")
ROWS: list[dict[str, Any]] = [{"id": f"id {i}", "prompt": f"row {i}", "draft": "d" * (i * 7 % 11)} for i in range(30)]


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    made = Workplace(tmp_path / "place")
    write(made, ROWS)
    return made


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
