"""Two thousand malformed rows among good ones: each gets an error that says what is wrong with it, and harms no other."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from engine.job import source as module
from tests.engine.job.defects import DEFECTS, LONGEST_LINE, QUESTIONS, VOCABULARY
from tests.engine.job.helpers import call, lines, made, parse, timeless

MALFORMED, GOOD_ROWS = 2000, 500
OPTIONS = ("--max-new-tokens", "4", "--token-ids")


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the input: what it is and what its error must say; nothing of a good one."""

    kind: str
    text: bytes
    says: tuple[str, ...] = ()
    id: str | int | None = None


@dataclass(frozen=True, slots=True)
class Corpus:
    entries: list[Entry]
    places: list[int]
    """Line numbers; blank lines lie between."""
    status: int
    rows: list[dict[str, Any]]
    alone: list[dict[str, Any]]
    """The good rows when there are no others."""


def good_line(random: Random, number: int) -> Entry:
    """Rows that look odd and are right."""
    word = "".join(random.choices("abc \u00e4\u4e2d", k=random.randint(1, 12))) + "?"
    identity: Any = random.choice([None, f"good {number}", number, -number, ""])
    deep = json.loads("[" * 250 + "]" * 250)
    row: Any = random.choice([
        {"prompt": word},
        {"prompt": word, "draft": None, "messages": None, "draft_ids": None},
        {"prompt": word, "draft": "", "score": 1e308, "n": 10**300, "half": "\udc00", "deep": deep},
        {"messages": [{"role": "assistant", "content": ""}, {"role": "user", "content": word}], "draft": word},
        {"prompt_ids": random.choices(range(VOCABULARY), k=5), "draft_ids": [0, VOCABULARY - 1]},
        {"turns": [word, "and then?"], "drafts": [word]},
        {"instruction": word, "output": "", "input": "", "generator": "m"},
        {"question_id": 81, "choices": [{"turns": ["red"]}], "model_id": "m", "turns": 5, "prompt": None},
    ])  # fmt: skip
    if identity is not None:
        row = {"id": identity, **row}
    text = json.dumps(row, ensure_ascii="half" in row or random.random() < 0.5).encode()
    if random.random() < 0.1:
        text = b'{"prompt": 5, "turns": "not this one", ' + text[1:] if "prompt" in row and "turns" not in row else text
    return Entry("good", b" " * random.randint(0, 2) + text + random.choice([b"", b"\r", b" \t"]))


def bad_line(random: Random, number: int) -> Entry:
    defect = DEFECTS[number % len(DEFECTS)]
    row, says = defect(random)
    if isinstance(row, bytes):
        return Entry(defect.__name__, row, tuple(says))
    identity = row.setdefault("id", f"bad {number}")
    row["tag"] = defect.__name__
    fits = isinstance(identity, str | int) and not isinstance(identity, bool)
    return Entry(defect.__name__, json.dumps(row).encode(), tuple(says), identity if fits else None)


@pytest.fixture(scope="module")
def corpus(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    random = Random(20250304)
    entries = [bad_line(random, i) for i in range(MALFORMED)] + [good_line(random, i) for i in range(GOOD_ROWS)]
    random.shuffle(entries)
    content, places = [], []
    for entry in entries:
        content += random.choices([b"", b"\r", b" \t "], k=random.choice([0, 0, 0, 1, 2]))
        content.append(entry.text)
        places.append(len(content))
    folder = tmp_path_factory.mktemp("fuzz")
    questions = made(folder, "questions.jsonl", lines([*QUESTIONS]))
    good = lines([entry.text for entry in entries if entry.kind == "good"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_ROW_BYTES", LONGEST_LINE)
        options = ("--questions", str(questions), *OPTIONS)
        status = call(model, made(folder, "in.jsonl", b"\n".join(content)), folder / "out.jsonl", *options)
        assert call(model, made(folder, "good.jsonl", good), folder / "alone.jsonl", *options) == 0
    rows, alone = (parse((folder / name).read_bytes()) for name in ("out.jsonl", "alone.jsonl"))
    return Corpus(entries, places, status, rows, alone)


def test_every_row_is_answered_in_its_place(corpus: Corpus) -> None:
    assert corpus.status == 3
    assert [row["index"] for row in corpus.rows] == list(range(MALFORMED + GOOD_ROWS))
    wrong = [
        (entry.kind, entry.text[:100], row["error"])
        for entry, row in zip(corpus.entries, corpus.rows, strict=True)
        if (row["error"] is None) != (entry.kind == "good")
    ]
    assert wrong == []


def test_good_rows_are_what_they_are_alone(corpus: Corpus) -> None:
    mixed = [row for entry, row in zip(corpus.entries, corpus.rows, strict=True) if entry.kind == "good"]
    assert len(mixed) == len(corpus.alone) == GOOD_ROWS
    for row, alone in zip(timeless(mixed), timeless(corpus.alone), strict=True):
        if alone["id"] == alone["index"] and row["id"] == row["index"]:
            row["id"] = alone["id"]
        assert {**row, "index": 0} == {**alone, "index": 0}


def test_every_error_says_what_was_got_and_what_was_expected(corpus: Corpus) -> None:
    kinds: Counter[str] = Counter()
    for entry, place, row in zip(corpus.entries, corpus.places, corpus.rows, strict=True):
        if entry.kind == "good":
            continue
        kinds[entry.kind] += 1
        error, says = row["error"], [words for words in entry.says if words != "RequestTooLong"]
        assert error["type"] == ("RequestTooLong" if len(says) < len(entry.says) else "InvalidRequest"), entry
        assert [words for words in says if words not in error["message"]] == [], (entry.kind, error["message"])
        assert len(error["message"]) < 500, entry.kind
        if any(" is not valid JSON" in words or " must hold a JSON" in words for words in says):
            assert error["message"].startswith(f"line {place} "), entry.kind
    assert len(kinds) == len(DEFECTS)
    assert min(kinds.values()) >= MALFORMED // len(DEFECTS)


def test_error_rows_keep_what_could_be_read(corpus: Corpus) -> None:
    for entry, row in zip(corpus.entries, corpus.rows, strict=True):
        if entry.kind == "good":
            continue
        assert row["id"] == (row["index"] if entry.id is None else entry.id)
        assert row.get("tag") == (entry.kind if b'"tag"' in entry.text else None)
        answer = [row[name] for name in ("text", "converged", "finish_reason", "token_ids")]
        assert answer == [None, False, "error", []]
        if "turn 2 of 2" not in row["error"]["message"]:
            assert (row["steps"], row["forward_tokens"], row.get("answers", [])) == (0, 0, [])
