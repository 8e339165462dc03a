"""Rows of several turns, of AlpacaEval and of FastChat: refined in their own format, behind refined history."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine import RefineOptions, Refiner
from tests.engine.job.helpers import (
    DATA,
    MAX_NEW,
    call,
    lines,
    made,
    planned,
    run,
    timeless,
)  # fmt: skip

ANSWER_FIELDS = ("text", "steps", "converged", "forward_tokens", "finish_reason")


def by_hand(
    refiner: Refiner, turns: list[str], drafts: list[str | None], options: RefineOptions
) -> list[dict[str, Any]]:
    """Turn by turn with Refiner.refine, each behind the refined answers of those before it."""
    messages: list[dict[str, str]] = []
    answers = []
    for turn, draft in zip(turns, drafts, strict=True):
        messages = [*messages, {"role": "user", "content": turn}]
        result = refiner.refine([{"messages": messages, **({"draft": draft} if draft is not None else {})}], options)[0]
        assert result.error is None
        answers.append({name: getattr(result, name) for name in ANSWER_FIELDS})
        messages = [*messages, {"role": "assistant", "content": result.text or ""}]
    return answers


def summed(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """What the row of several answers says of them all."""
    return {
        "text": answers[-1]["text"],
        "steps": sum(answer["steps"] for answer in answers),
        "converged": all(answer["converged"] for answer in answers),
        "forward_tokens": sum(answer["forward_tokens"] for answer in answers),
        "finish_reason": answers[-1]["finish_reason"],
        "answers": answers,
        "error": None,
    }


class TestTurns:
    ROWS: tuple[dict[str, Any], ...] = (
        {"id": "both", "category": "x", "turns": ["Name a colour", "Another one?"], "drafts": ["red", "blue"]},
        {"turns": ["Say hello", "and then", "at last"], "drafts": ["hello"]},
        {"question_id": 9, "turns": ["only one"], "drafts": None},
        {"id": None, "turns": ["a", "b"], "drafts": [None, "draft of the second only"]},
    )

    def test_history_is_what_was_refined(self, model: Path, refiner: Refiner, tmp_path: Path) -> None:
        status, rows = run(model, tmp_path, lines([*self.ROWS]))
        assert status == 0
        want = []
        for index, row in enumerate(self.ROWS):
            drafts = row["drafts"] or []
            padded = drafts + [None] * (len(row["turns"]) - len(drafts))
            answers = by_hand(refiner, row["turns"], padded, planned(len(self.ROWS)))
            carried = {name: value for name, value in row.items() if name not in ("id", "turns", "drafts")}
            identity = ["both", 1, 9, 3][index]
            want.append({**carried, "id": identity, "index": index, **summed(answers)})
        assert timeless(rows) == want

    def test_the_draft_is_no_history(self, model: Path, tmp_path: Path) -> None:
        """Fixed points: other drafts of the first turn change no answer of the second."""
        rows = [{"turns": ["x", "y"], "drafts": [draft]} for draft in ("one", "entirely different", "")]
        _, done = run(model, tmp_path, lines(rows))
        assert len({json.dumps([answer["text"] for answer in row["answers"]]) for row in done}) == 1

    def test_with_few_steps_the_draft_shapes_each_answer(self, model: Path, refiner: Refiner, tmp_path: Path) -> None:
        _, rows = run(model, tmp_path, lines([*self.ROWS]), "--steps", "1", "--token-ids")
        for row, before in zip(rows, self.ROWS, strict=True):
            drafts = before["drafts"] or []
            padded = drafts + [None] * (len(before["turns"]) - len(drafts))
            want = by_hand(refiner, before["turns"], padded, planned(len(self.ROWS), steps=1))
            answers = timeless(row["answers"])
            assert [{name: answer[name] for name in ANSWER_FIELDS} for answer in answers] == want
            assert all(len(answer["token_ids"]) <= MAX_NEW for answer in answers)
            assert row["token_ids"] == answers[-1]["token_ids"]

    def test_turn_that_cannot_be_refined(self, model: Path, refiner: Refiner, tmp_path: Path) -> None:
        turns = ["short", "x" * 3000, "never asked"]
        status, rows = run(model, tmp_path, lines([{"id": 5, "turns": turns, "drafts": ["d"], "kept": 1}]))
        first = by_hand(refiner, turns[:1], ["d"], planned(1))
        assert status == 3
        row = timeless(rows)[0]
        assert (row["id"], row["kept"], row["text"], row["finish_reason"]) == (5, 1, None, "error")
        assert row["answers"] == first
        assert (row["steps"], row["converged"]) == (first[0]["steps"], False)
        assert row["error"]["type"] == "RequestTooLong"
        assert row["error"]["message"].startswith("turn 2 of 3: prompt of ")


class TestAlpacaEval:
    ROWS: tuple[dict[str, Any], ...] = (
        {"dataset": "helpful_base", "instruction": "Name a colour", "output": "red", "generator": "model x"},
        {"dataset": "koala", "instruction": "Say \u00e4\u2028\U0001f600", "output": "", "generator": "model x"},
        {"dataset": "koala", "instruction": "No input", "input": "", "output": "so so", "generator": "model x"},
    )

    def test_array_in_array_out(self, model: Path, refiner: Refiner, tmp_path: Path) -> None:
        """The contract of the reader: a JSON array of objects with instruction, output and one generator."""
        source = made(tmp_path, "model_outputs.json", json.dumps(self.ROWS, indent=2, ensure_ascii=False).encode())
        target = tmp_path / "refined.json"
        assert call(model, source, target) == 0
        rows = json.loads(target.read_text(encoding="utf-8"))
        requests = [{"prompt": row["instruction"], "draft": row["output"]} for row in self.ROWS]
        results = refiner.refine(requests, planned(64))
        for row, before, result in zip(rows, self.ROWS, results, strict=True):
            assert list(row)[: len(before)] == list(before)
            assert {name: row[name] for name in before} == {
                **before, "output": result.text, "generator": "model x+refined"
            }  # fmt: skip
            assert (row["text"], row["error"]) == (result.text, None)
        assert [row["id"] for row in rows] == [0, 1, 2]
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "model_outputs.json", "refined.json", "refined.json.job"
        ]  # fmt: skip

    def test_refined_again(self, model: Path, tmp_path: Path) -> None:
        """An output is an input of the same format; it is already a fixed point."""
        source = made(tmp_path, "a.json", json.dumps(self.ROWS).encode())
        assert call(model, source, tmp_path / "b.json") == 0
        assert call(model, tmp_path / "b.json", tmp_path / "c.json") == 0
        first, second = (json.loads((tmp_path / name).read_bytes()) for name in ("b.json", "c.json"))
        assert [row["output"] for row in second] == [row["output"] for row in first]
        assert {row["generator"] for row in second} == {"model x+refined+refined"}

    def test_row_with_an_error_has_no_answer_that_a_judge_could_take_for_one(self, model: Path, tmp_path: Path) -> None:
        bad = {"instruction": "x" * 3000, "output": "draft", "generator": "model x"}
        status, rows = run(model, tmp_path, lines([bad]))
        assert status == 3
        assert {name: rows[0][name] for name in bad} == {**bad, "output": None, "generator": "model x+refined"}
        assert rows[0]["error"]["type"] == "RequestTooLong"

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"instruction": 3}, "instruction must be a string, got int"),
            ({"instruction": None}, "instruction must be a string, got nothing"),
            ({"instruction": ""}, "instruction, output: prompt is empty"),
            ({"output": ["x"]}, "output must be a string, got list"),
            ({"input": "more"}, "instruction and input"),
        ],
    )
    def test_what_is_wrong(self, model: Path, tmp_path: Path, change: dict[str, Any], says: str) -> None:
        status, rows = run(model, tmp_path, lines([{**self.ROWS[0], **change}]))
        assert (status, rows[0]["error"]["type"]) == (3, "InvalidRequest")
        assert says in rows[0]["error"]["message"]


class TestFastChat:
    QUESTIONS: tuple[dict[str, Any], ...] = (
        {"question_id": 81, "category": "writing", "turns": ["Name a colour", "Another one?"]},
        {"question_id": 82, "category": "maths", "turns": ["What is 1+1?"], "reference": ["2"]},
        {"question_id": "text", "category": "x", "turns": ["Say hello", "Again"]},
    )
    ANSWERS: tuple[dict[str, Any], ...] = (
        {"question_id": 82, "answer_id": "A", "model_id": "m", "choices": [{"index": 0, "turns": ["two"]}], "tstamp": 1.5},
        {"question_id": 81, "answer_id": "B", "model_id": "m", "tstamp": 2.5, "choices": [
            {"index": 0, "turns": ["red", "blue"]}, {"index": 1, "turns": ["green"]}, {"index": 2, "turns": ["", "x"]}]},
        {"question_id": "text", "answer_id": "C", "model_id": "m", "choices": [{"turns": ["hello", "hello"]}], "tstamp": 3},
    )  # fmt: skip

    def refine(self, model: Path, folder: Path, answers: list[Any], *options: str) -> tuple[int, list[dict[str, Any]]]:
        questions = made(folder, "question.jsonl", lines([*self.QUESTIONS]))
        return run(model, folder, lines(answers), "--questions", str(questions), *options)

    def test_every_choice_is_a_conversation(self, model: Path, refiner: Refiner, tmp_path: Path) -> None:
        """The contract of the reader: lines of objects with question_id and choices[i].turns."""
        status, rows = self.refine(model, tmp_path, [*self.ANSWERS])
        assert status == 0
        turns = {question["question_id"]: question["turns"] for question in self.QUESTIONS}
        for index, (row, before) in enumerate(zip(timeless(rows), self.ANSWERS, strict=True)):
            answers, choices = [], []
            for choice in before["choices"]:
                asked = turns[before["question_id"]][: len(choice["turns"])]
                done = by_hand(refiner, asked, choice["turns"], planned(len(self.ANSWERS)))
                choices.append({**choice, "turns": [answer["text"] for answer in done]})
                answers += done
            assert row == {
                **before, "choices": choices, "model_id": "m+refined", "id": before["question_id"], "index": index,
                **summed(answers),
            }  # fmt: skip

    def test_read_as_the_benchmark_reads_its_answers(self, model: Path, tmp_path: Path) -> None:
        self.refine(model, tmp_path, [*self.ANSWERS])
        by_question = {}
        with (tmp_path / "out.jsonl").open() as file:
            for line in file:
                answer = json.loads(line)
                by_question[answer["question_id"]] = answer
        assert list(by_question) == [82, 81, "text"]
        for before in self.ANSWERS:
            refined = by_question[before["question_id"]]
            assert [len(choice["turns"]) for choice in refined["choices"]] == [
                len(choice["turns"]) for choice in before["choices"]
            ]
            assert all(isinstance(turn, str) for choice in refined["choices"] for turn in choice["turns"])
            assert (refined["answer_id"], refined["tstamp"]) == (before["answer_id"], before["tstamp"])

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"question_id": 99}, "question_id must name one of the 3 questions, got 99"),
            ({"question_id": "81"}, "question_id must name one of the 3 questions, got '81'"),
            ({"question_id": None}, "got None"),
            ({"question_id": [81]}, "question_id must be a string or an integer, got list"),
            ({"choices": None}, "choices must be a non-empty list, got nothing"),
            ({"choices": []}, "choices must be a non-empty list, got list without elements"),
            ({"choices": "x"}, "choices must be a non-empty list, got str"),
            ({"choices": ["x"]}, 'choices[0] must be {"turns": [text, ...], ...}, got str'),
            ({"choices": [{"turns": ["a"]}, {}]}, "choices[1].turns must be a non-empty list of texts, got nothing"),
            ({"choices": [{"turns": "a"}]}, "choices[0].turns must be a non-empty list of texts, got str"),
            ({"choices": [{"turns": ["a", 5]}]}, "choices[0].turns[1] must be a string, got int"),
            ({"choices": [{"turns": ["a", "b", "c"]}]}, "got 3 choices[0].turns for 2 turns of question 81"),
            ({"choices": [{"turns": ["\ud800"]}]}, "draft is not valid Unicode"),
        ],
    )
    def test_what_is_wrong(self, model: Path, tmp_path: Path, change: dict[str, Any], says: str) -> None:
        good = self.ANSWERS[1]
        status, rows = self.refine(model, tmp_path, [good, {**good, **change}])
        assert (status, rows[0]["error"]) == (3, None)
        assert rows[1]["error"]["type"] == "InvalidRequest"
        assert says in rows[1]["error"]["message"]
        assert rows[1]["model_id"] == "m+refined"
        assert "choices" not in rows[1]  # the drafts, which a judge could take for answers

    def test_without_its_questions(self, model: Path, tmp_path: Path) -> None:
        status, rows = run(model, tmp_path, lines([*self.ANSWERS]))
        assert status == 3
        assert all("--questions FILE" in row["error"]["message"] for row in rows)

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"{", "question 0: line 1 is not valid JSON"),
            (lines([QUESTIONS[0], {"turns": ["x"]}]), "question 1: question_id must be a string or an integer, got nothing"),
            (lines([{"question_id": 1}]), "question 0: turns must be a non-empty list of texts, got nothing"),
            (lines([{"question_id": 1, "turns": ["x", None]}]), "question 0: turns[1] must be a string, got nothing"),
        ],
    )  # fmt: skip
    def test_broken_question_file(
        self, model: Path, tmp_path: Path, content: bytes, says: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        questions = made(tmp_path, "question.jsonl", content)
        assert run(model, tmp_path, lines([*self.ANSWERS]), "--questions", str(questions)) == (2, [])
        assert says in capsys.readouterr().err


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data")
def test_real_drafts(model: Path, refiner: Refiner, tmp_path: Path) -> None:
    content = b"".join((DATA / "mt_bench_drafts.jsonl").read_bytes().splitlines(keepends=True)[:6])
    before = [json.loads(line) for line in content.splitlines()]
    status, rows = run(model, tmp_path, content, "--max-new-tokens", "4")
    assert status == 0
    for index, (row, draft) in enumerate(zip(timeless(rows), before, strict=True)):
        answers = by_hand(refiner, draft["turns"], draft["drafts"], planned(len(before), max_new_tokens=4))
        carried = {name: draft[name] for name in ("id", "category", "model")}
        assert row == {**carried, "index": index, **summed(answers)}
