"""Parquet input: its types in JSON, row groups, damage."""

import datetime
import json
import os
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from engine.job.source import Source
from tests.engine.job.helpers import GOOD, call, lines, made, parse, read_rows, run

BOM = b"\xef\xbb\xbf"


class TestParquet:
    @pytest.fixture(autouse=True)
    def _pyarrow(self) -> None:
        pytest.importorskip("pyarrow")

    def write(self, path: Path, table: Any, **options: Any) -> Path:
        from pyarrow import parquet

        parquet.write_table(table, path, **options)
        return path

    def table(self, **columns: Any) -> Any:
        import pyarrow

        return pyarrow.table(columns)

    def test_nested_columns_and_nulls(self, tmp_path: Path) -> None:
        chat = [{"role": "user", "content": "hi \u00e4"}]
        columns: dict[str, list[Any]] = {
            "prompt": ["a", None, None],
            "messages": [None, chat, None],
            "prompt_ids": [None, None, [1, 2]],
            "draft": ["", "x", None],
            "meta": [{"k": 1, "l": [0.5, None]}, None, {"k": None, "l": []}],
            "flag": [True, None, False],
        }
        path = self.write(tmp_path / "in.parquet", self.table(**columns))
        want = [{name: values[i] for name, values in columns.items()} for i in range(3)]
        assert read_rows(path) == want
        assert Source.open(str(path)).rows == 3

    def test_what_json_lacks(self, tmp_path: Path) -> None:
        nan, moment = float("nan"), datetime.datetime(2024, 2, 29, 12, 30, 1, 5)
        table = self.table(
            score=[nan, 1.5, float("inf")],
            when=[moment, None, moment],
            day=[moment.date(), None, None],
            at=[moment.time(), None, None],
            price=[Decimal("12.50"), None, Decimal("-0.01")],
            nested=[[{"x": nan}], [], None],
        )
        rows = read_rows(self.write(tmp_path / "in.parquet", table))
        assert rows[0] == {
            "score": None, "when": "2024-02-29T12:30:01.000005", "day": "2024-02-29", "at": "12:30:01.000005",
            "price": "12.50", "nested": [{"x": None}],
        }  # fmt: skip
        assert rows[1] == {"score": 1.5, "when": None, "day": None, "at": None, "price": None, "nested": []}
        assert (rows[2]["score"], rows[2]["price"]) == (None, "-0.01")
        assert json.loads(json.dumps(rows, allow_nan=False)) == rows

    def test_bytes_cost_the_rows_that_have_them(self, tmp_path: Path) -> None:
        rows = read_rows(self.write(tmp_path / "in.parquet", self.table(prompt=["a", "b"], image=[b"\x00", None])))
        assert rows == [
            "column 'image' holds bytes, which JSON cannot: convert or drop it",
            {"prompt": "b", "image": None},
        ]

    def test_cell_that_cannot_be_read_costs_its_row(self, tmp_path: Path) -> None:
        import pyarrow

        broken = pyarrow.array([b"fine", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
        far = pyarrow.array([0, 2**62], pyarrow.timestamp("us"))
        for name, column in (("prompt", broken), ("when", far)):
            rows = read_rows(self.write(tmp_path / f"{name}.parquet", self.table(**{name: column})))
            assert isinstance(rows[0], dict)
            assert rows[1].startswith("row 1 cannot be read: ")

    @pytest.mark.parametrize("count", [0, 1, 256, 1000])
    @pytest.mark.parametrize("group", [100, 256, 5000])
    def test_row_groups(self, tmp_path: Path, count: int, group: int) -> None:
        table = self.table(id=list(range(count)), prompt=[f"p{i}" for i in range(count)])
        path = self.write(tmp_path / "in.parquet", table, row_group_size=group)
        assert read_rows(path) == [{"id": i, "prompt": f"p{i}"} for i in range(count)]

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1 nothing PAR1", b'{"prompt": "x"}\n'])
    def test_not_parquet(self, tmp_path: Path, content: bytes) -> None:
        with pytest.raises(ValueError, match=r"in.parquet is not a Parquet file: "):
            Source.open(str(made(tmp_path, "in.parquet", content)))

    def test_damage_inside_keeps_the_rows_before(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        count = 600
        table = self.table(prompt=["p"] * count, pad=[os.urandom(100).hex() for _ in range(count)])
        path = self.write(tmp_path / "in.parquet", table, row_group_size=300, compression="zstd", use_dictionary=False)
        content = bytearray(path.read_bytes())
        middle = len(content) * 3 // 4
        content[middle : middle + 2000] = bytes(2000)
        path.write_bytes(content)
        assert call(model, path, tmp_path / "out.jsonl", "--max-new-tokens", "1") == 1
        done = parse((tmp_path / "out.jsonl").read_bytes())
        assert [row["index"] for row in done] == list(range(len(done)))
        assert 256 <= len(done) <= 300
        errors = capsys.readouterr().err
        assert f"in.parquet cannot be read behind row {len(done)}" in errors
        assert "Traceback" not in errors

    def test_without_pyarrow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = self.write(tmp_path / "in.parquet", self.table(prompt=["a"]))
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ValueError, match="needs pyarrow: pip install"):
            Source.open(str(path))

    def test_refined_as_from_lines(self, model: Path, tmp_path: Path) -> None:
        """A row's answer does not depend on the form of its file; absent fields are nulls in Parquet."""
        import pyarrow

        rows = [{name: value for name, value in row.items() if name not in ("id", "seed", "source")} for row in GOOD]
        names = sorted({name for row in rows for name in row})
        table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
        path = self.write(tmp_path / "in.parquet", table)
        assert call(model, path, tmp_path / "parquet.jsonl") == 0
        _, want = run(model, tmp_path, lines(rows))
        got = parse((tmp_path / "parquet.jsonl").read_bytes())
        fields = ("index", "text", "steps", "forward_tokens", "finish_reason")
        assert [[row[name] for name in fields] for row in got] == [[row[name] for name in fields] for row in want]
