"""What was asked, for input files that hold answers alone: FastChat's question file, or a batch's input file."""

from collections.abc import Mapping
from typing import Any

from engine.errors import InvalidRequest
from engine.job.source import Fields, Source, kind_of
from engine.request import Request

Questions = Mapping[Any, list[Any]]
"""Texts of the turns by question_id, chat messages by custom_id."""


def read_questions(path: str) -> tuple[Questions, str]:
    """Reads rows of question_id and turns (FastChat), or of custom_id and body.messages (OpenAI's batch format).

    Returns them and the file's digest. Raises OSError, ValueError.
    """
    source = Source.open(path)
    if source.digest is None:
        raise ValueError(f"the questions {path} must be a regular file")
    questions: dict[Any, list[Any]] = {}
    for number, raw in enumerate(source.read()):
        try:
            fields = raw()
            key, asked = _batch_request(fields) if "custom_id" in fields else _question(fields)
        except InvalidRequest as error:
            raise ValueError(f"{path}, question {number}: {error}") from error
        if questions.setdefault(key, asked) != asked:
            raise ValueError(
                f"{path}, question {number}: {key!r:.80} stands for something else before: give it another name"
            )
    return questions, source.digest


def _question(fields: Fields) -> tuple[str | int, list[str]]:
    key, turns = fields.get("question_id"), fields.get("turns")
    if not isinstance(key, str | int):
        raise InvalidRequest(f"question_id must be a string or an integer, got {kind_of(key)}")
    if not isinstance(turns, list) or not turns:
        raise InvalidRequest(f"turns must be a non-empty list of texts, got {kind_of(turns)}")
    for i, turn in enumerate(turns):
        if not isinstance(turn, str):
            raise InvalidRequest(f"turns[{i}] must be a string, got {kind_of(turn)}")
        Request(prompt=turn)
    return key, turns


def _batch_request(fields: Fields) -> tuple[str, list[Any]]:
    key, body = fields["custom_id"], fields.get("body")
    if not isinstance(key, str):
        raise InvalidRequest(f"custom_id must be a string, got {kind_of(key)}")
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list):
        raise InvalidRequest(f"body.messages must be a list, as of /v1/chat/completions, got {kind_of(messages)}")
    return key, Request(messages=[_in_one_text(message) for message in messages]).messages or []


def _in_one_text(message: Any) -> Any:
    """A message whose content is in parts of text, with one text; any other is for the request to judge."""
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        return message
    return {**message, "content": "".join(str(part.get("text", "")) for part in parts)}
