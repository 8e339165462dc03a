"""The shipped refiner: converged greedy answers do not depend on the draft, and the report says so."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engine.evaluate.command import main
from engine.refiner import DEFAULT_CHECKPOINT
from tests.engine.evaluate.helpers import SCORERS, read, write

ROWS = [
    {"prompt": f"How do I {what}?", "draft": f"You can {what} at home. First, you read about it.", "model": "m"}
    for what in ("boil an egg", "plant a tree", "learn a language")
]
ROWS[2]["draft"] += " Then you speak it every day with people who know it, and write down what you did not know."


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controls")
    write(folder / "in.jsonl", ROWS)
    arguments = [
        "controls", "--input", folder / "in.jsonl", "--output", folder / "out", "--callable", f"{SCORERS}:letters",
        "--max-new-tokens", "16", "--reward-at-steps", "1",
    ]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    return folder / "out"


def test_converged_answers_are_the_refiners_own(out: Path) -> None:
    rows = {path.stem: read(path) for path in out.glob("*.jsonl")}
    assert set(rows) == {"given", "alone", "shuffled", "random", "steps-1", "keep_prefix", "condition"}
    assert all(row["converged"] for row in rows["given"])
    for name in ("alone", "shuffled", "random"):
        assert [row["answers"] for row in rows[name]] == [row["answers"] for row in rows["given"]]
        assert [row["reward"] for row in rows[name]] == [row["reward"] for row in rows["given"]]
    for name in ("steps-1", "keep_prefix", "condition"):
        assert [row["answers"] for row in rows[name]] != [row["answers"] for row in rows["given"]]
    for row in rows["keep_prefix"]:
        assert row["answers"][0].split()[:3] == row["drafts"][0].split()[:3]
    assert all(row["steps"] == 1 for row in rows["steps-1"])


def test_drafts_are_cut_at_the_refiners_limit(out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT)
    for row, given in zip(read(out / "given.jsonl"), ROWS, strict=True):
        ids = tokenizer(given["draft"])["input_ids"]
        assert row["drafts_cut"] == [len(ids) >= 16]
        assert row["drafts"] == [tokenizer.decode(ids[:16]) if len(ids) > 16 else given["draft"]]
    assert read(out / "given.jsonl")[2]["drafts_cut"] == [True]


def test_an_answer_that_fills_the_limit_is_cut(out: Path) -> None:
    """Also after K steps, whose iterate then has no end of turn."""
    end = AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT).eos_token_id
    reasons = set()
    for path in (out / "work").glob("*.refined.jsonl"):
        done = {row["id"]: row["answers"][0] for row in read(path)}
        for row in read(out / path.name.replace(".refined", "")):
            answer = done[row["index"]]
            full = len(answer["token_ids"]) == 16 and answer["token_ids"][-1] != end
            assert row["cut"] == full, path
            reasons |= {answer["finish_reason"]} if full else set()
    assert reasons == {"length", "steps"}


def test_a_draft_that_fills_the_limit_is_cut_as_the_same_answer_would_be(out: Path, tmp_path: Path) -> None:
    """A refined answer of so many tokens has no room for the end of turn."""
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT)
    ids = tokenizer(ROWS[2]["draft"], add_special_tokens=False)["input_ids"]
    texts = {count: tokenizer.decode(ids[:count]) for count in (15, 16, 17)}
    assert all(len(tokenizer(text, add_special_tokens=False)["input_ids"]) == n for n, text in texts.items())
    write(tmp_path / "in.jsonl", [{**ROWS[0], "draft": text} for text in texts.values()])
    arguments = [
        "rewards", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out", "--callable", f"{SCORERS}:letters",
        "--max-new-tokens", "16", "--reward-at-steps", "none", "--no-report",
    ]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    made = read(tmp_path / "out" / "given.jsonl")
    assert [row["drafts_cut"] for row in made] == [[False], [True], [True]]
    assert [row["drafts"][0] for row in made] == [texts[15], texts[16], texts[16]]


def test_the_report_says_what_the_controls_show(out: Path) -> None:
    made = json.loads((out / "results.json").read_text())["figures"]
    for name, same in (("alone", 3), ("shuffled", 3), ("random", 3), ("condition", 0)):
        assert made["against"][name]["same_text"] == same
    assert made["against"]["alone"]["difference"]["mean"] == 0.0
    text = (out / "report.md").read_text()
    assert "alone: all 3 answers are the same texts as given's" in text
    assert "has one fixed point, the refiner's own answer" in text
    for name in ("steps.png", "controls.png", "lengths.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
