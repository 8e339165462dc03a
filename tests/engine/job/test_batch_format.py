"""Results of OpenAI's batch format, as vllm run-batch writes them, refined in place.

Fields and their meaning: vllm/entrypoints/openai/run_batch.py (BatchRequestInput, BatchRequestOutput, BatchResponseData) and
OpenAI's batch guide. The lines of results hold no prompt: that is in the batch's input.
"""

from pathlib import Path
from typing import Any

import pytest

from engine import Refiner
from engine.job.questions import read_questions
from engine.request import Request
from tests.engine.job.helpers import lines, made, run, timeless
from tests.engine.job.test_formats import planned, summed


def asked(key: str, content: Any, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {
        "custom_id": key,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": messages, **body},
    }


def answered(key: str, *contents: Any) -> dict[str, Any]:
    choices = [
        {"index": i, "message": {"role": "assistant", "content": content, "tool_calls": []}, "finish_reason": "stop"}
        for i, content in enumerate(contents)
    ]
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": choices,
        "usage": {"n": 1},
    }
    response = {"status_code": 200, "request_id": "vllm-batch-1", "body": body}
    return {"id": f"vllm-{key}", "custom_id": key, "response": response, "error": None}


ASKED = (
    asked("b", "Name a colour"),
    asked("a", [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello"}], n=2),
)
ANSWERED = (answered("a", "hello hello", "hallo"), answered("b", "red red"))


def refine(model: Path, folder: Path, rows: list[Any], *options: str) -> tuple[int, list[dict[str, Any]]]:
    questions = made(folder, "batch.jsonl", lines([*ASKED]))
    return run(model, folder, lines(rows), "--questions", str(questions), *options)


def test_every_choice_is_refined(model: Path, refiner: Refiner, tmp_path: Path) -> None:
    status, rows = refine(model, tmp_path, [*ANSWERED])
    assert status == 0
    prompts = {"a": "Say hello", "b": "Name a colour"}
    for index, (row, before) in enumerate(zip(timeless(rows), ANSWERED, strict=True)):
        body = before["response"]["body"]
        message = [{"role": "user", "content": prompts[before["custom_id"]]}]
        requests = [Request(messages=message, draft=choice["message"]["content"]) for choice in body["choices"]]
        done = [one for request in requests for one in refiner.refine([request], planned(len(ANSWERED)))]
        choices = [
            {**choice, "message": {**choice["message"], "content": result.text}}
            for choice, result in zip(body["choices"], done, strict=True)
        ]
        body = {**body, "model": "m+refined", "choices": choices}
        expected = summed([{name: getattr(one, name) for name in FIELDS} for one in done])
        expected.pop("answers")
        assert row == {
            "custom_id": before["custom_id"], "response": {**before["response"], "body": body},
            "id": before["custom_id"], "index": index, **expected,
        }  # fmt: skip


FIELDS = ("text", "steps", "converged", "forward_tokens", "finish_reason")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"custom_id": "c"}, "custom_id must name one of the 2 requests, got 'c'"),
        ({"custom_id": 7}, "custom_id must name one of the 2 requests, got 7"),
        (
            {"error": {"code": "x", "message": "too long"}},
            "the batch has no answer to it: status 200, error {'code': 'x'",
        ),
        ({"response": None}, "the batch has no answer to it: status None"),
        (
            {"response": {"status_code": 400, "request_id": "r", "body": None}},
            "the batch has no answer to it: status 400",
        ),
        ({"response": {"status_code": 200, "body": {"choices": []}}}, "choices must be a non-empty list"),
        ({"response": {"status_code": 200, "body": {"choices": ["x"]}}}, "choices[0].message.content must be a string"),
        (answered("a", "good", None), "choices[1].message.content must be a string, got nothing"),
    ],
)
def test_a_bad_row_costs_only_itself(model: Path, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    good = ANSWERED[0]
    status, rows = refine(model, tmp_path, [good, {**good, **change}])
    assert (status, rows[0]["error"]) == (3, None)
    assert rows[1]["error"]["type"] == "InvalidRequest"
    assert says in rows[1]["error"]["message"]
    assert not rows[1].get("response"), "a draft must not be taken for a refined answer"


def test_the_batch_input_is_asked_for(model: Path, tmp_path: Path) -> None:
    status, rows = run(model, tmp_path, lines([ANSWERED[0]]))
    assert status == 3
    assert "give --questions BATCH_INPUT" in rows[0]["error"]["message"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"custom_id": "x", "body": {"prompt": "text"}}, "body.messages must be a list"),
        ({"custom_id": 5, "body": {"messages": []}}, "custom_id must be a string, got int"),
        (asked("a", "something else"), "'a' stands for something else before"),
        (asked("x", [{"type": "image_url", "image_url": {}}]), "content"),
    ],
)
def test_an_unusable_batch_input_is_refused(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match="question 2: ") as caught:
        read_questions(str(made(tmp_path, "batch.jsonl", lines([*ASKED, row]))))
    assert says in str(caught.value)
