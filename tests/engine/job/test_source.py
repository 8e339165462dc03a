"""Input of JSON lines, from files, gzip and pipes: which rows come out, what broken places cost, what a digest is of."""

import gzip
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.job import source as module
from engine.job.source import Source
from tests.engine.job.helpers import DATA, GOOD, call, lines, made, parse, read_rows, run, timeless

BOM = b"\xef\xbb\xbf"


class TestLines:
    @pytest.mark.parametrize("end", [b"\n", b"\r\n"])
    @pytest.mark.parametrize("last", [True, False])
    @pytest.mark.parametrize("start", [b"", BOM])
    @pytest.mark.parametrize("name", ["in.jsonl", "in.JSONL.GZ", "in.txt"])
    def test_plain_gzipped_and_from_windows(
        self, tmp_path: Path, name: str, start: bytes, last: bool, end: bytes
    ) -> None:
        content = start + lines(GOOD).replace(b"\n", end)
        content = content if last else content.removesuffix(end)
        zipped = name.endswith("GZ")
        path = made(tmp_path, name, gzip.compress(content) if zipped else content)
        assert read_rows(path) == GOOD
        found = Source.open(str(path))
        assert (found.form, found.gzipped, found.rows) == ("lines", zipped, None if zipped else len(GOOD))

    def test_gzip_of_several_members(self, tmp_path: Path) -> None:
        content = gzip.compress(lines(GOOD[:2])) + gzip.compress(b"") + gzip.compress(lines(GOOD[2:]))
        assert read_rows(made(tmp_path, "in.jsonl.gz", content)) == GOOD

    @pytest.mark.parametrize("content", [b"", b"\n\n", BOM, BOM + b"\r\n", b" \t\r\n\n"])
    def test_no_rows(self, tmp_path: Path, content: bytes) -> None:
        assert read_rows(made(tmp_path, "in.jsonl", content)) == []

    def test_blank_lines_count_for_the_line_number_only(self, tmp_path: Path) -> None:
        rows = read_rows(made(tmp_path, "in.jsonl", b"\n{}\n \t\r\n\n[1]\n\x0b{}\n"))
        assert rows[0] == {}
        assert rows[1] == "line 5 must hold a JSON object, got list"
        assert rows[2].startswith("line 6 is not valid JSON: ")

    def test_no_other_character_ends_a_line(self, tmp_path: Path) -> None:
        text = "a\u2028b\u2029c\x85d\x0ce"
        content = json.dumps({"prompt": text}, ensure_ascii=False).replace("\\f", "\\u000c").encode() + b"\n"
        assert read_rows(made(tmp_path, "in.jsonl", content)) == [{"prompt": text}]

    @pytest.mark.parametrize("extra", [-1, 0, 1, 2, 90])
    @pytest.mark.parametrize("end", [b"", b"\n"])
    def test_line_over_the_limit_costs_only_itself(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: int, end: bytes
    ) -> None:
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 40)
        monkeypatch.setattr(module, "BLOCK", 16)
        long = {"prompt": "x" * (40 - len(b'{"prompt": ""}') + extra)}
        text = json.dumps(long).encode()
        assert len(text) == 40 + extra
        good = [{"id": 1}] * 2
        want: list[Any] = [long if extra <= 0 else "line 2 is longer than 40 bytes"]
        assert read_rows(made(tmp_path, "last.jsonl", b'{"id": 1}\n' + text + end)) == good[:1] + want
        assert read_rows(made(tmp_path, "in.jsonl", b'{"id": 1}\n' + text + b'\n{"id": 1}' + end)) == [
            good[0], *want, good[1]
        ]  # fmt: skip

    @given(
        rows=st.lists(
            st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.integers() | st.none(), max_size=3),
            max_size=6,
        ),
        ascii_only=st.booleans(),
        block=st.integers(2, 9),
    )
    def test_any_objects_come_back(
        self, tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], ascii_only: bool, block: int
    ) -> None:
        text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
        folder = tmp_path_factory.mktemp("any")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "BLOCK", block)
            assert read_rows(made(folder, "in.jsonl", text.encode())) == rows
            assert read_rows(made(folder, "in.jsonl.gz", gzip.compress(text.encode()))) == rows


class TestGzip:
    @pytest.mark.parametrize("name", ["in.jsonl.gz", "in.json.gz"])
    def test_cut_off_keeps_the_rows_before(
        self, model: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [{"prompt": f"prompt {i}", "pad": os.urandom(400).hex()} for i in range(100)]
        content = lines(rows) if name == "in.jsonl.gz" else json.dumps(rows).encode()
        path = made(tmp_path, name, gzip.compress(content)[:-2000])
        assert call(model, path, tmp_path / "out.jsonl", "--max-new-tokens", "2") == 1
        done = parse((tmp_path / "out.jsonl").read_bytes())
        assert 50 < len(done) < 100
        assert [row["pad"] for row in done] == [row["pad"] for row in rows[: len(done)]]
        errors = capsys.readouterr().err
        assert f"{name} is not a whole gzip file" in errors
        assert "Traceback" not in errors

    @pytest.mark.parametrize(
        "content", [b"not gzip at all\n", b"\x1f\x8b\x08\x00garbage that is no deflate stream....."]
    )
    def test_not_gzip(self, model: Path, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
        assert call(model, made(tmp_path, "in.jsonl.gz", content), tmp_path / "out.jsonl") == 1
        errors = capsys.readouterr().err
        assert "gzip" in errors
        assert "Traceback" not in errors


def test_digest_is_the_contents_and_the_number_of_lines_is_right(tmp_path: Path) -> None:
    seen = set()
    for i, content in enumerate((b"", b"{}", b"{}\n", b"{}\n{}", b"x" * (3 << 20), b"x" * (3 << 20) + b"\n")):
        path = made(tmp_path, f"{i}.jsonl", content)
        found = Source.open(str(path))
        assert found.rows == len(content.splitlines())
        again = Source.open(str(made(tmp_path, "again.jsonl", content)))
        assert again.digest == found.digest
        seen.add(found.digest)
    assert len(seen) == 6


@pytest.mark.parametrize("name", ["in.parquet.gz", "in.parquet.GZ"])
def test_gzipped_parquet_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="unpack it"):
        Source.open(str(made(tmp_path, name, b"")))


class TestPipe:
    def test_fifo_is_opened_once_so_its_writer_lives(self, model: Path, tmp_path: Path) -> None:
        fifo = tmp_path / "in.fifo"
        os.mkfifo(fifo)
        failed: list[BaseException] = []

        def write() -> None:
            try:
                with fifo.open("wb") as file:
                    for row in GOOD:
                        file.write(lines([row]))
                        file.flush()
            except OSError as error:
                failed.append(error)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        status = call(model, fifo, tmp_path / "out.jsonl")
        writer.join(60)
        assert failed == []
        rows = parse((tmp_path / "out.jsonl").read_bytes())
        assert (status, [row["index"] for row in rows]) == (0, list(range(len(GOOD))))

    def test_rows_from_a_pipe_are_those_from_a_file(self, model: Path, tmp_path: Path) -> None:
        """``-`` in this process: standard input is a pipe."""
        _, want = run(model, tmp_path, lines(GOOD), "--window", "4")
        reading, writing = os.pipe()
        real = os.dup(0)
        os.dup2(reading, 0)
        try:
            os.write(writing, BOM + lines(GOOD))
            os.close(writing)
            assert call(model, Path("-"), tmp_path / "piped.jsonl", "--window", "4") == 0
        finally:
            os.dup2(real, 0)
            os.close(real)
            os.close(reading)
        assert timeless(parse((tmp_path / "piped.jsonl").read_bytes())) == timeless(want)

    @pytest.mark.parametrize("name", ["in.json", "in.jsonl.gz", "in.parquet"])
    def test_only_lines_are_read_from_a_fifo(self, tmp_path: Path, name: str) -> None:
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match="only JSON lines are read from a pipe"):
            Source.open(str(tmp_path / name))

    def test_closed_standard_input(self) -> None:
        code = (
            "import os; os.close(0)\n"
            "from engine.job.source import Source\n"
            "try: Source.open('-')\nexcept OSError: print('refused')"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        assert (done.stdout, done.stderr) == ("refused\n", "")

    def test_output_into_a_fifo(self, model: Path, tmp_path: Path) -> None:
        fifo = tmp_path / "out.fifo"
        os.mkfifo(fifo)
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()), daemon=True)
        reader.start()
        assert call(model, made(tmp_path, "in.jsonl", lines(GOOD)), fifo) == 0
        reader.join(60)
        assert [row["index"] for row in parse(got[0])] == list(range(len(GOOD)))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.fifo"]

    @pytest.mark.parametrize(("device", "status"), [("/dev/null", 0), ("/dev/full", 1)])
    def test_output_into_a_device(
        self, model: Path, tmp_path: Path, device: str, status: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        if not Path(device).exists():
            pytest.skip(f"needs {device}")
        assert call(model, made(tmp_path, "in.jsonl", lines(GOOD)), Path(device)) == status
        assert ("No space left" in capsys.readouterr().err) == (status == 1)
        assert not Path(f"{device}.job").exists()


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data")
def test_real_files_line_by_line_and_as_an_array(tmp_path: Path) -> None:
    for file in sorted(DATA.glob("*.jsonl")):
        with open(file, encoding="utf-8", newline="\n") as text:
            want = [json.loads(line) for line in text if line.strip()]
        assert read_rows(file) == want
        assert read_rows(made(tmp_path, "in.json", json.dumps(want, indent=1, ensure_ascii=False).encode())) == want


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
any_lines = st.one_of(
    json_values.map(lambda value: json.dumps(value).encode()),
    st.tuples(json_values.map(lambda value: json.dumps(value).encode()), st.integers(0, 20)).map(
        lambda p: p[0][: p[1]]
    ),
    st.binary(max_size=20),
).map(lambda line: line.replace(b"\n", b" "))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(any_lines, max_size=6))
def test_any_bytes_are_read_or_refused_line_by_line(tmp_path: Path, content: list[bytes]) -> None:
    rows = read_rows(made(tmp_path, "in.jsonl", b"\n".join(content)))
    kept = [(number, line) for number, line in enumerate(content, 1) if line.removeprefix(BOM * (number == 1)).strip()]
    assert len(rows) == len(kept)
    for row, (number, line) in zip(rows, kept, strict=True):
        if isinstance(row, dict):
            assert json.loads(line.removeprefix(BOM * (number == 1)).rstrip().decode()) == row
        else:
            assert row.startswith(f"line {number} ")


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n' * 3)
    source = Source.open(str(path))
    rows = source.read()
    assert next(rows)() == {"prompt": "a"}
    with path.open("a") as file:
        file.write('{"prompt": "b"}\n')
    with pytest.raises(OSError, match="was changed while it was read"):
        list(rows)


@pytest.mark.parametrize("change", ["touched", "removed"])
def test_a_file_that_keeps_its_content_while_it_is_read(change: str, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n' * 3)
    rows = Source.open(str(path)).read()
    next(rows)
    os.utime(path, (1, 1)) if change == "touched" else path.unlink()
    assert len(list(rows)) == 2
