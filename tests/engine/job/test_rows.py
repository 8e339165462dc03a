"""Rows of every shape: what they ask of the refiner, what they become, what is wrong with them."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import Refiner
from engine.job.source import MAX_DEPTH
from tests.engine.job.helpers import (
    GOOD,
    OUTPUT_FIELDS,
    call,
    expected,
    lines,
    made,
    parse,
    planned,
    run,
    timeless,
)  # fmt: skip

BAD: list[bytes] = [
    b'{"prompt": "broken"',
    b"[1, 2]",
    b"{}",
    b'{"prompt": 5}',
    b'{"prompt": ""}',
    b'{"prompt": "two", "prompt_ids": [1]}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "nan", "x": NaN}',
    b'{"prompt": "big", "x": 1e999}',
    b'{"prompt_ids": [99999999]}',
    b'{"prompt_ids": []}',
    b'{"messages": [{"role": "assistant", "content": "x"}]}',
    b'{"prompt": "half a pair \\ud800"}',
    b'{"id": [1], "prompt": "x"}',
    b'{"messages": ' + b"[" * 985 + b"]" * 985 + b"}",
    b"[" * 100000,
    b"null",
    b"\x00",
]


def test_bad_rows_keep_their_place_and_change_no_other_row(model: Path, refiner: Refiner, tmp_path: Path) -> None:
    mixed: list[dict[str, Any] | bytes] = []
    for i, bad in enumerate(BAD):
        mixed += [GOOD[i % len(GOOD)], bad]
    status, rows = run(model, tmp_path, lines(mixed))
    assert status == 3
    assert [row["index"] for row in rows] == list(range(len(mixed)))
    want = expected(refiner, GOOD, planned(len(mixed)))
    for i, (good, refused) in enumerate(zip(timeless(rows[::2]), rows[1::2], strict=True)):
        reference = want[i % len(GOOD)]
        identity = {"index": 2 * i, "id": 2 * i if i % len(GOOD) == 1 else reference["id"]}
        assert good == {**reference, **identity}
        assert refused["error"]["type"] == "InvalidRequest", BAD[i][:80]
        assert refused["error"]["message"]
        assert (refused["text"], refused["steps"], refused["finish_reason"]) == (None, 0, "error")


def test_what_an_error_row_says(model: Path, tmp_path: Path) -> None:
    bad = [b"", b'{"prompt": "x",', b"  \r", b'{"id": "b", "draft": "no prompt", "kept": [1]}']
    status, rows = run(model, tmp_path, lines(bad))
    assert status == 3
    assert [(row["id"], row["index"]) for row in rows] == [(0, 0), ("b", 1)]
    assert rows[0]["error"]["message"].startswith("line 2 is not valid JSON: ")
    assert rows[1]["kept"] == [1]
    assert "prompt_ids" in rows[1]["error"]["message"]


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": 5},
        {"turns": "one"},
        {"instruction": None, "output": "x", "generator": "m"},
        {"question_id": 7, "choices": [], "model_id": "m"},
    ],
)
def test_error_rows_of_every_shape_keep_id_and_other_fields(model: Path, tmp_path: Path, bad: dict[str, Any]) -> None:
    _, rows = run(model, tmp_path, lines([{**bad, "id": "mine", "kept": {"a": [1]}}]))
    assert (rows[0]["id"], rows[0]["kept"], rows[0]["error"]["type"]) == ("mine", {"a": [1]}, "InvalidRequest")
    for name in ("generator", "model_id"):
        assert rows[0].get(name) == (f"{bad[name]}+refined" if name in bad else None)


def test_carried_fields_come_back_as_they_were(model: Path, tmp_path: Path) -> None:
    carried = {"metadata": {"a": [1.5, None, "\u00e4"]}, "half": "\ud800", "seed": -1, "nested": [[{}]], "text": "old"}
    status, rows = run(model, tmp_path, lines([{**GOOD[1], **carried}]))
    assert status == 0
    assert {name: rows[0][name] for name in carried if name != "text"} == {
        k: v for k, v in carried.items() if k != "text"
    }
    assert rows[0]["text"] != "old"


@pytest.mark.parametrize("name", ["out.jsonl", "out.json"])
def test_rows_nested_as_deep_as_can_be_come_back_or_are_refused(model: Path, tmp_path: Path, name: str) -> None:
    """Reading the output again, to merge it or to go on, must take whatever was written."""
    depths = [250, 256, *range(252, 1010, 3)]
    content = b"".join(b'{"prompt": "x", "deep": ' + b"[" * depth + b"]" * depth + b"}\n" for depth in depths)
    source, target = made(tmp_path, "in.jsonl", content), tmp_path / name
    assert call(model, source, target, "--max-new-tokens", "1") == 3
    written = target.read_bytes()
    good = written.count(b'"error": null')
    assert good == sum(depth < MAX_DEPTH for depth in depths)  # the object itself is a level
    assert written.count(b'"index"') == len(depths)
    assert written.count(b"is nested deeper than 256 levels") == len(depths) - good
    assert call(model, source, target, "--max-new-tokens", "1") == 3
    assert target.read_bytes() == written
    assert call(model, source, target, "--max-new-tokens", "1", "--retry-errors") == 3
    assert target.read_bytes().count(b'"error": null') == good


class Kept:
    """A refiner that stays open for the next example."""

    def __init__(self, refiner: Refiner) -> None:
        self.session, self.max_batch_size = refiner.session, refiner.max_batch_size

    def close(self) -> None:
        pass


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
field_values = json_values | st.lists(st.integers(-1, 300), max_size=4) | st.lists(st.text(max_size=3), max_size=3)
field_names = st.sampled_from(
    "id prompt messages prompt_ids draft draft_ids seed metadata index text error other turns drafts instruction output "
    "generator question_id choices answers seconds".split()
)
row_lines = st.dictionaries(field_names, field_values, max_size=4).map(lambda row: json.dumps(row).encode())
cut_lines = st.tuples(row_lines, st.integers(0, 40)).map(lambda pair: pair[0][: pair[1]])
any_lines = st.one_of(row_lines, cut_lines, json_values.map(lambda v: json.dumps(v).encode()), st.binary(max_size=30))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(any_lines.map(lambda line: line.replace(b"\n", b" ")), max_size=8))
def test_every_line_yields_one_row(content: list[bytes], model: Path, refiner: Refiner, tmp_path: Path) -> None:
    for path in tmp_path.glob("out.jsonl*"):
        path.unlink()
    with mock.patch.object(Refiner, "from_pretrained", autospec=True, return_value=Kept(refiner)):
        status, rows = run(model, tmp_path, b"".join(line + b"\n" for line in content), "--max-new-tokens", "3")
    assert len(rows) == sum(bool(line.strip()) for line in content)
    assert [row["index"] for row in rows] == list(range(len(rows)))
    for row in rows:
        assert set(row) >= OUTPUT_FIELDS
        if row["error"] is None:
            assert isinstance(row["text"], str)
        else:
            assert row["error"]["type"] in ("InvalidRequest", "RequestTooLong")
            assert row["error"]["message"]
    assert status == (3 if any(row["error"] for row in rows) else 0)
    assert parse((tmp_path / "out.jsonl").read_bytes()) == rows
