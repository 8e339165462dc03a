"""A row of a trajectory file, checked when it is read.

    {"prompt_id": .., "prompt": .., "source"?: .., "messages"?: [..],
     "responses": [{"model": .., "text": .., "reward"?: number | null, "truncated"?: true}, ..]}

``messages`` is there where the prompt is more than one user's turn; ``prompt`` is then the same as one text. Files written
by this package also have ``index`` (number of the row) and ``error`` (null, or why the row holds nothing to train on).
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from engine.errors import InvalidRequest, InvalidTrajectory
from engine.job.source import Fields, RawRow, Source
from engine.request import Request

ROW_FIELDS = ("prompt_id", "prompt", "source", "messages", "responses", "index", "error")
RESPONSE_FIELDS = ("model", "text", "reward", "truncated")


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One model's answer."""

    model: str
    text: str
    reward: float | None = None
    """None where it is missing."""
    truncated: bool = False
    """Cut at a length limit: it has no end of turn."""

    def fields(self) -> Fields:
        cut: Fields = {"truncated": True} if self.truncated else {}
        return {"model": self.model, "text": self.text, "reward": self.reward, **cut}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryRow:
    """A prompt and the answers to it, in no particular order."""

    prompt_id: str | int
    prompt: str
    source: str | None = None
    messages: list[dict[str, str]] | None = None
    """The chat, where it is more than one user's turn."""
    responses: list[Response] = field(default_factory=list)

    def chat(self) -> list[dict[str, str]]:
        """The prompt as messages."""
        return self.messages or [{"role": "user", "content": self.prompt}]

    def fields(self) -> Fields:
        fields: Fields = {"prompt_id": self.prompt_id, "prompt": self.prompt}
        if self.source is not None:
            fields["source"] = self.source
        if self.messages is not None:
            fields["messages"] = self.messages
        return {**fields, "responses": [response.fields() for response in self.responses]}


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that could not be used."""

    file: str
    row: int
    """From 0."""
    error: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}: {self.error}"

    def fields(self) -> Fields:
        return {"file": self.file, "row": self.row, "error": self.error}


def normalised(text: str) -> str:
    """A text with its white space made even: prompts that agree in this are the same."""
    return " ".join(text.split())


def prompt_key(prompt: str) -> str:
    """Identifies a prompt whatever its white space."""
    return hashlib.blake2b(normalised(prompt).encode(), digest_size=12).hexdigest()


def usable_ids(value: object, prompt: str) -> str | int:
    """The id a row gives, or one made of its prompt."""
    if value is None:
        return prompt_key(prompt)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InvalidTrajectory(f"prompt_id must be a string or an integer, got {type(value).__name__}")
    return value


def checked_text(name: str, value: object) -> str:
    """Raises InvalidTrajectory unless it is a text that can be written."""
    if not isinstance(value, str):
        raise InvalidTrajectory(f"{name} must be a string, got {type(value).__name__}: mend the row or leave it out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidTrajectory(f"{name} is not valid Unicode text: {error}") from None
    return value


def checked_reward(name: str, value: object) -> float | None:
    """Raises InvalidTrajectory unless it is a finite number or missing."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidTrajectory(f"{name} must be a number, or null where it is missing, got {value!r:.80}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidTrajectory(f"{name} must be a finite number, got {value!r:.80}; use null where it is missing")
    return number


def parse_response(value: object, name: str) -> Response:
    """Raises InvalidTrajectory."""
    if not isinstance(value, Mapping):
        raise InvalidTrajectory(f'{name} must be {{"model": .., "text": ..}}, got {type(value).__name__}')
    unknown = sorted(str(key) for key in value if key not in RESPONSE_FIELDS)
    if unknown:
        raise InvalidTrajectory(f"{name} has unknown fields {unknown!s:.200}; known are {list(RESPONSE_FIELDS)}")
    truncated = value.get("truncated", False)
    if not isinstance(truncated, bool):
        raise InvalidTrajectory(f"{name}.truncated must be true or false, got {truncated!r:.80}")
    return Response(
        model=checked_text(f"{name}.model", value.get("model")),
        text=checked_text(f"{name}.text", value.get("text")),
        reward=checked_reward(f"{name}.reward", value.get("reward")),
        truncated=truncated,
    )


def parse_row(fields: Fields) -> TrajectoryRow:
    """A row of a trajectory file. Raises InvalidTrajectory; unknown fields beside the known ones are no error."""
    if fields.get("error") is not None:
        raise InvalidTrajectory(f"an error row of an earlier command: {json.dumps(fields['error']):.300}")
    prompt = checked_text("prompt", fields.get("prompt"))
    if not prompt.strip():
        raise InvalidTrajectory("prompt is empty: leave the row out")
    responses = fields.get("responses")
    if not isinstance(responses, list):
        raise InvalidTrajectory(
            f"responses must be a list, got {type(responses).__name__}: see --help for a row's shape"
        )
    source, messages = fields.get("source"), fields.get("messages")
    return TrajectoryRow(
        prompt_id=usable_ids(fields.get("prompt_id"), prompt),
        prompt=prompt,
        source=None if source is None else checked_text("source", source),
        messages=None if messages is None else checked_messages(messages),
        responses=[parse_response(value, f"responses[{i}]") for i, value in enumerate(responses)],
    )


def checked_messages(messages: object) -> list[dict[str, str]]:
    """A chat that ends with the user's turn, by the same rules as a request's. Raises InvalidTrajectory."""
    try:
        request = Request(messages=messages)  # type: ignore[arg-type]
    except InvalidRequest as error:
        raise InvalidTrajectory(str(error)) from None
    return [dict(message) for message in request.messages or []]


def read_checked(
    source: Source, parse: Callable[[Fields], TrajectoryRow]
) -> Iterator[tuple[int, TrajectoryRow | BadRow]]:
    """The rows of a file, each as ``parse`` reads it or with why it could not. Raises OSError."""
    for number, raw in enumerate(source.read()):
        yield number, _read_one(source.path, number, raw, parse)


def _read_one(path: str, number: int, raw: RawRow, parse: Callable[[Fields], TrajectoryRow]) -> TrajectoryRow | BadRow:
    try:
        return parse(raw())
    except (InvalidRequest, InvalidTrajectory) as error:
        return BadRow(path, number, str(error))


def read_rows(path: str) -> Iterator[TrajectoryRow | BadRow]:
    """The rows of a trajectory file (.jsonl, .json, either gzipped, or .parquet). Raises OSError, ValueError."""
    for _, row in read_checked(Source.open(path), parse_row):
        yield row


def without_repeats(row: TrajectoryRow) -> TrajectoryRow:
    """Identical responses, but for white space around them, once: the first, with the first reward among them."""
    first: dict[str, Response] = {}
    for response in row.responses:
        known = first.setdefault(response.text.strip(), response)
        if known.reward is None and response.reward is not None:
            first[response.text.strip()] = replace(known, reward=response.reward)
    return replace(row, responses=list(first.values()))


def error_fields(error: BaseException | str, kind: str = "InvalidTrajectory") -> dict[str, Any]:
    """What ``error`` of an output row holds."""
    if isinstance(error, str):
        return {"type": kind, "message": error}
    return {"type": type(error).__name__, "message": str(error)}
