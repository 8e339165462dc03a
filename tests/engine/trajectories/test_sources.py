"""Prompts and responses in the formats they are published in; rows that are wrong; repeats."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from engine.errors import InvalidTrajectory
from engine.trajectories import BadRow, read_rows
from engine.trajectories.schema import parse_row, prompt_key
from engine.trajectories.sources import parse_any
from tests.engine.trajectories.helpers import call, read, row, write

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
OTHER = {"role": "assistant", "content": "No idea."}


def shape(fields: dict[str, Any], **options: bool) -> tuple[str, list[tuple[str, str, float | None]]]:
    made = parse_any(fields, **options)
    assert made == parse_row(json.loads(json.dumps(made.fields())))
    return made.prompt, [(r.model, r.text, r.reward) for r in made.responses]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "Why?"}, []),
        ({"instruction": "Why?", "input": ""}, []),
        ({"messages": [USER]}, []),
        ({"prompt": [USER]}, []),
        ({"messages": [USER, ANSWER]}, []),
        ({"instruction": "Why?", "output": "Because.", "generator": "m"}, [("m", "Because.", None)]),
        (
            {
                "prompt": "Why?",
                "chosen": [USER, ANSWER],
                "rejected": [USER, OTHER],
                "score_chosen": 8,
                "score_rejected": 5,
            },
            [("rejected", "No idea.", 5.0), ("chosen", "Because.", 8.0)],
        ),
        (
            {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No idea."},
            [("rejected", "No idea.", None), ("chosen", "Because.", None)],
        ),
        (
            {"instruction": "Why?", "completions": [{"model": "m", "response": "Because.", "overall_score": 7.5}]},
            [("m", "Because.", 7.5)],
        ),
        (
            {
                "prompt": "Why?",
                "all_generated_responses": ["No idea.", "Because."],
                "all_rm_scores": [0.11, 0.17],
                "chosen": [USER, ANSWER],
                "rejected": [USER, OTHER],
            },
            [("sample 0", "No idea.", 0.11), ("sample 1", "Because.", 0.17)],
        ),
        ({"prompt": "Why?", "all_generated_responses": ["Because."]}, [("sample 0", "Because.", None)]),
        ({"prompt": "Why?", "responses": [{"model": "m", "text": "t", "reward": 1}]}, [("m", "t", 1.0)]),
    ],
)
def test_formats(fields: dict[str, Any], expected: list[Any]) -> None:
    assert shape(fields) == ("Why?", expected)


def test_pair_rewards_only_where_there_is_no_score() -> None:
    pair = {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}
    assert [reward for _, _, reward in shape(pair, pair_rewards=True)[1]] == [0.0, 1.0]
    scored = {**pair, "score_chosen": 2, "score_rejected": 3}
    assert [reward for _, _, reward in shape(scored, pair_rewards=True)[1]] == [3.0, 2.0]


def test_several_turns_are_kept_as_a_chat() -> None:
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    made = parse_any({"chosen": text + "d", "rejected": text + "e"})
    assert made.prompt == "Human: a\n\nAssistant: b\n\nHuman: c"
    assert made.chat() == [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs prompt"),
        ({"prompt": 3}, "must be a string"),
        ({"prompt": " "}, "empty"),
        ({"prompt": "\ud800"}, "Unicode"),
        ({"messages": [ANSWER]}, "non-empty"),
        ({"messages": "no"}, "list"),
        ({"prompt": "p", "prompt_id": 1.5, "responses": []}, "prompt_id"),
        ({"prompt": "p", "responses": {}}, "must be a list"),
        ({"prompt": "p", "responses": [3]}, r"responses\[0\]"),
        ({"prompt": "p", "responses": [{"model": "m"}]}, r"responses\[0\].text"),
        ({"prompt": "p", "responses": [{"text": "m"}]}, r"responses\[0\].model"),
        ({"prompt": "p", "responses": [{"model": "m", "text": "t", "reward": "7"}]}, "must be a number"),
        ({"prompt": "p", "responses": [{"model": "m", "text": "t", "reward": True}]}, "must be a number"),
        ({"prompt": "p", "responses": [{"model": "m", "text": "t", "reward": 10**400}]}, "finite"),
        ({"prompt": "p", "responses": [{"model": "m", "text": "t", "rewrad": 1}]}, "unknown fields"),
        ({"prompt": "p", "responses": [], "error": {"type": "x"}}, "error row"),
        ({"chosen": [USER, ANSWER], "rejected": [ANSWER, OTHER]}, "different prompts"),
        ({"chosen": "no transcript", "rejected": "none"}, "transcript"),
        ({"chosen": [USER], "rejected": [USER]}, "must end with the assistant"),
        ({"instruction": "i", "input": "x"}, "join them"),
        ({"prompt": "p", "completions": [1]}, r"completions\[0\]"),
        ({"prompt": "p", "all_generated_responses": "one"}, "must be a list, got str"),
        ({"prompt": "p", "all_generated_responses": ["a", "b"], "all_rm_scores": [1]}, "a list of 2 numbers"),
        ({"prompt": "p", "all_generated_responses": [1], "all_rm_scores": [1]}, r"all_generated_responses\[0\]"),
    ],
)
def test_wrong_rows_say_what_is_wrong(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidTrajectory, match=message):
        parse_any(fields)


def test_bad_rows_cost_only_themselves(tmp_path: Path) -> None:
    rows = [row(0, ("m", "t", 1.0)), b'{"broken', b'{"prompt": "p", "responses": [{"reward": NaN}]}', row(3)]
    path = write(tmp_path / "rows.jsonl", rows)
    got = list(read_rows(str(path)))
    assert [made.row if isinstance(made, BadRow) else made.prompt_id for made in got] == ["p0", 1, 2, "p3"]
    assert str(got[1]).startswith(f"{path}, row 1: ")


def test_repeats_are_kept_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [
        {"prompt_id": 1, "prompt": "What  is\nthis? "},
        {"prompt_id": 2, "prompt": "What is this?"},
        {"prompt_id": 1, "prompt": "Another"},
    ]
    first = [{"prompt": "what?", "responses": []}, {**row(0), "prompt": "What is this?"}]
    first[1]["responses"] = [
        {"model": "a", "text": "same\n", "reward": None}, {"model": "b", "text": " same", "reward": 2},
        {"model": "c", "text": "sa me", "reward": 1},
    ]  # fmt: skip
    more = {"instruction": "Another", "output": "yes", "generator": "d"}
    out = tmp_path / "out.jsonl"
    assert call(
        "build", "--prompts", write(tmp_path / "p.jsonl", prompts), "--responses", write(tmp_path / "a.jsonl", first),
        write(tmp_path / "b.jsonl", [more]), "--output", out,
    ) == 0  # fmt: skip
    one, two = read(out)
    assert (one["prompt_id"], one["prompt"]) == (1, "What  is\nthis? ")
    assert [(r["model"], r["text"], r["reward"]) for r in one["responses"]] == [
        ("a", "same\n", 2.0),
        ("c", "sa me", 1.0),
    ]
    assert two["prompt_id"] == f"1-{prompt_key('Another')}"
    assert "1 rows of --responses belong to none" in capsys.readouterr().err


def test_bad_rows_of_a_build_are_told(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", [b"{", row(0, ("m", "t", 1.0)), row(1), {"prompt": "q", "responses": [1]}])
    assert call("build", "--prompts", source, "--output", tmp_path / "out.jsonl") == 3
    assert read(tmp_path / "out.jsonl") == [row(0, ("m", "t", 1.0))]
    told = read(tmp_path / "out.jsonl.errors")
    assert [(line.get("row"), line.get("prompt_id")) for line in told] == [(0, None), (3, None), (None, "p1")]


def test_parquet_and_sample(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q{i}", "prompt_id": str(i), "score_chosen": 1.0 + i, "score_rejected": float("nan") if i else 0.5,
         "chosen": [{"role": "user", "content": f"q{i}"}, ANSWER], "rejected": [{"role": "user", "content": f"q{i}"}, OTHER]}
        for i in range(20)
    ]  # fmt: skip
    source = tmp_path / "ultra.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    picked = []
    for seed in (0, 0, 1):
        out = tmp_path / f"{len(picked)}.jsonl"
        assert call("build", "--prompts", source, "--output", out, "--sample", 5, "--seed", seed) == 0
        picked.append([made["prompt_id"] for made in read(out)])
    assert len(picked[0]) == 5
    assert picked[0] == picked[1] != picked[2]
    assert picked[0] == sorted(picked[0], key=int)
    whole = tmp_path / "whole.jsonl"
    assert call("build", "--prompts", source, "--output", whole) == 0
    assert [r["reward"] for r in read(whole)[0]["responses"]] == [0.5, 1.0]
    assert [r["reward"] for r in read(whole)[1]["responses"]] == [None, 2.0]


def test_build_keeps_what_is_not_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "p.jsonl", [row(0, ("m", "t", 1.0))])
    out = write(tmp_path / "out.jsonl", [{"mine": 1}])
    assert call("build", "--prompts", source, "--output", out) == 2
    assert read(out) == [{"mine": 1}]
    assert call("build", "--prompts", source, "--output", source) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert call("build", "--prompts", source, "--output", out, "--overwrite") == 0
    assert call("build", "--prompts", source, "--output", out) == 0
    assert read(out) == [row(0, ("m", "t", 1.0))]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "a"], ["--endpoint", "http://a"], ["--endpoint", "a", "--model", "m"],
        ["--endpoint", "http://a", "--model", "m", "--model", "m"], ["--api-key-env", "NOT_A_VARIABLE"],
        ["--endpoint", "http://a", "--model", "m", "--price-in", "1", "--price-in", "2"], ["--temperature", "3"],
        ["--checkpoint", "not/a/folder"],
    ],
)  # fmt: skip
def test_wrong_options_are_refused_before_anything_is_written(tmp_path: Path, arguments: list[str]) -> None:
    source = write(tmp_path / "p.jsonl", [row(0)])
    assert call("build", "--prompts", source, "--output", tmp_path / "out.jsonl", *arguments) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]
