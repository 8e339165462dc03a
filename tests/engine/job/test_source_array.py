"""Input that is a JSON array: cut apart as it comes, broken elements, broken ends."""

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.job import source as module
from engine.job.source import Source
from tests.engine.job.helpers import GOOD, lines, made, read_rows

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 7)


ELEMENTS = [{"prompt": 'quote " and \\ and ]}', "n": [1, [2, {"a": "b,"}]]}, {"prompt": "ä\u2028"}, {}, {"draft": ""}]


class TestArray:
    @pytest.mark.parametrize("indent", [None, 0, 2, "\t"])
    @pytest.mark.parametrize("start", [b"", BOM, BOM + b"\r\n  " * 30])
    @pytest.mark.parametrize("name", ["in.json", "in.json.gz"])
    @pytest.mark.parametrize("block", [2, 5, 64, 1 << 20])
    def test_however_it_is_written(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        indent: int | str | None,
        start: bytes,
        name: str,
        block: int,
    ) -> None:
        content = start + json.dumps(ELEMENTS, indent=indent, ensure_ascii=bool(indent)).encode() + b"\n \n"
        path = made(tmp_path, name, gzip.compress(content) if name.endswith(".gz") else content)
        monkeypatch.setattr(module, "BLOCK", block)
        assert read_rows(path) == ELEMENTS
        assert Source.open(str(path)).form == "array"

    @pytest.mark.parametrize("content", [b"[]", b" [ ] \n", BOM + b"[\n]", b"", b"  \n"])
    @pytest.mark.usefixtures("small_blocks")
    def test_no_rows(self, tmp_path: Path, content: bytes) -> None:
        assert read_rows(made(tmp_path, "in.json", content)) == []

    @pytest.mark.usefixtures("small_blocks")
    def test_broken_elements_cost_only_themselves(self, tmp_path: Path) -> None:
        broken = [b"{'a': 1}", b"7", b"", b'{"a": NaN}', b'"text, [ or { of it"', b'{"a": 1]', b'{"a" 1}', b"nul"]
        parts = [part for i, bad in enumerate(broken) for part in (bad, b'{"i": %d}' % i)]
        rows = read_rows(made(tmp_path, "in.json", b"[" + b",\n".join(parts) + b"]"))
        assert rows[1::2] == [{"i": i} for i in range(len(broken))]
        for i, message in enumerate(rows[::2]):
            assert isinstance(message, str), broken[i]
            assert message.startswith(f"element {2 * i} "), message
        assert rows[2] == "element 2 must hold a JSON object, got int"
        assert rows[6] == "element 6 is not valid JSON: NaN is not a finite number"

    @pytest.mark.parametrize("broken", [b'{"a": [1}', b'{"a": "1}', b'{"a": 1', b'["a'])
    @pytest.mark.usefixtures("small_blocks")
    def test_without_its_other_quote_or_bracket_it_takes_the_rest_along_but_never_in_silence(
        self, tmp_path: Path, broken: bytes
    ) -> None:
        rows = read_rows(made(tmp_path, "in.json", b'[{"i": 0}, ' + broken + b', {"i": 2}]'))
        assert rows[0] == {"i": 0}
        assert isinstance(rows[1], str)
        assert rows[1].startswith("element 1 is ")

    @pytest.mark.parametrize("cut", range(1, 11))
    @pytest.mark.usefixtures("small_blocks")
    def test_cut_off(self, tmp_path: Path, cut: int) -> None:
        content = b'[{"a": 1}, {"b": 2}, {"c": 3}]'[:-cut]
        rows = read_rows(made(tmp_path, "in.json", content))
        assert rows[:2] == [{"a": 1}, {"b": 2}]
        assert len(rows) == 3
        if content.rstrip().endswith(b","):
            assert rows[2] == "the array has no end: the file breaks off behind element 1"
        else:
            assert rows[2] == "element 2 is cut off: the array has no end"

    @pytest.mark.parametrize("behind", [b'{"a": 2}', b'[{"a": 2}]', b"]", b" \n, 1"])
    @pytest.mark.parametrize("block", [3, 9, 1 << 20])
    def test_text_behind_the_end_is_not_passed_over_in_silence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: bytes, block: int
    ) -> None:
        monkeypatch.setattr(module, "BLOCK", block)
        rows = read_rows(made(tmp_path, "in.json", b'[{"a": 1}]\n' + behind))
        assert rows[0] == {"a": 1}
        assert len(rows) == 2
        assert rows[1].startswith("the array ends, and more text follows it: ")

    @pytest.mark.parametrize("extra", [0, 1, 500])
    @pytest.mark.usefixtures("small_blocks")
    def test_element_over_the_limit_costs_only_itself(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: int
    ) -> None:
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 40)
        long = {"a": "y" * (40 - len(b'{"a": ""}') + extra)}
        rows = read_rows(
            made(tmp_path, "in.json", json.dumps([{"i": 0}, long, {"i": 2}], separators=(",", ": ")).encode())
        )
        assert rows == [{"i": 0}, "element 1 is longer than 40 bytes" if extra else long, {"i": 2}]

    def test_no_more_of_a_huge_element_is_kept_than_the_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1000)
        cut = module._ArrayCutter()
        for _ in range(10_000):
            assert list(cut.feed(b'"' + b"x" * 98 + b'"')) == []
        assert len(cut.rest()) <= 1000 + 100

    @pytest.mark.usefixtures("small_blocks")
    def test_lines_under_the_name_of_an_array(self, tmp_path: Path) -> None:
        assert read_rows(made(tmp_path, "in.json", BOM + b"\n \n" + lines(GOOD))) == GOOD

    @settings(max_examples=200)
    @given(
        elements=st.lists(
            st.dictionaries(
                st.text(alphabet='ab"\\[]{},: \n', max_size=4),
                st.recursive(
                    st.text(alphabet='xy"\\[]{},: \t\u00e4', max_size=6) | st.integers() | st.booleans() | st.none(),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
                    max_leaves=5,
                ),
                max_size=3,
            ),
            max_size=5,
        ),
        indent=st.none() | st.integers(0, 3),
        cuts=st.lists(st.integers(0, 400), max_size=12),
    )
    def test_cut_apart_anywhere_the_elements_are_those_of_json(
        self, elements: list[dict[str, Any]], indent: int | None, cuts: list[int]
    ) -> None:
        text = json.dumps(elements, indent=indent, ensure_ascii=False).encode()
        assert json.loads(text) == elements
        text = text.lstrip()[1:]
        places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
        cut = module._ArrayCutter()
        found = [piece for a, b in pairwise(places) for piece in cut.feed(text[a:b])]
        rest = cut.rest()
        assert cut.closed
        assert cut.behind == b""
        assert [json.loads(piece) for piece in (*found, rest) if piece.strip()] == elements


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60).map(lambda data: b"[" + data), block=st.integers(2, 20))
def test_any_bytes_in_an_array_end_in_rows_or_messages(tmp_path: Path, content: bytes, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        rows = read_rows(made(tmp_path, "in.json", content))
    try:
        whole = json.loads(content)
    except ValueError:
        assert any(isinstance(row, str) for row in rows) or content.rstrip().rstrip(b"]").rstrip().endswith(b",")
    else:
        assert [row for row in rows if isinstance(row, dict)] == [row for row in whole if isinstance(row, dict)]
