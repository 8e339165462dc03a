"""From an input row to its requests, turn by turn, and from their results to its output row.

Besides rows of ``prompt`` and ``draft`` this reads, as they are, rows with ``turns`` and ``drafts``, AlpacaEval's model
outputs, FastChat's MT-bench answers and results of OpenAI's batch format; each comes back in the shape it had, with the
refined answers in place of the drafts.
"""

import json
from dataclasses import dataclass, field
from typing import Literal

from engine.errors import EngineError, InvalidRequest
from engine.job.questions import Questions
from engine.job.source import Fields, RawRow, kind_of
from engine.request import Request, Result

REQUEST_FIELDS = ("prompt", "messages", "prompt_ids", "draft", "draft_ids")
RESULT_FIELDS = ("text", "steps", "converged", "forward_tokens", "finish_reason", "seconds")
OWN_FIELDS = ("id", "index", *RESULT_FIELDS, "token_ids", "answers", "error")
"""Fields of an output row that are never carried over from the input."""
REFINED = "+refined"
"""What a model's name gets behind it where the row said whose answer it holds."""

Shape = Literal["plain", "turns", "alpaca-eval", "fastchat", "batch"]
_SHAPES: dict[str, Shape] = {
    "custom_id": "batch", "choices": "fastchat", "turns": "turns", "instruction": "alpaca-eval"
}  # fmt: skip
_IDS: dict[Shape, str] = {"batch": "custom_id"}
"""By the field that tells them."""


@dataclass(slots=True)
class Turn:
    """One answer to refine; with ``first`` False the turns before it are its history."""

    request: Request
    first: bool = True


@dataclass(slots=True)
class Row:
    """An input row on its way: ``request`` and ``take`` alternate until ``finished``."""

    index: int
    id: str | int
    carried: Fields = field(default_factory=dict)
    shape: Shape = "plain"
    turns: list[Turn] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    error: EngineError | None = None

    @property
    def finished(self) -> bool:
        return self.error is not None or len(self.results) == len(self.turns)

    def request(self) -> Request:
        """The next turn's, behind the *refined* answers of the turns before it."""
        at = len(self.results)
        turn = self.turns[at]
        if turn.first:
            return turn.request
        start = max(i for i in range(at) if self.turns[i].first)
        messages: list[dict[str, str]] = []
        for i in range(start, at):
            messages.append({"role": "user", "content": self.turns[i].request.prompt or ""})
            messages.append({"role": "assistant", "content": self.results[i].text or ""})
        messages.append({"role": "user", "content": turn.request.prompt or ""})
        return Request(messages=messages, draft=turn.request.draft, id=turn.request.id)

    def take(self, result: Result) -> None:
        """The result of the last request."""
        if result.error and len(self.turns) > 1:
            text = f"turn {len(self.results) + 1} of {len(self.turns)}: {result.error}"
            self.error = type(result.error)(text)
        elif result.error:
            self.error = result.error
        else:
            self.results.append(result)

    def taken_over(self) -> Fields:
        """What its output row has from the input: id and carried fields."""
        return {**self.carried, "id": self.id}

    def line(self, token_ids: bool) -> bytes:
        """The output row as a line of JSON."""
        try:
            return encode(self._output(token_ids))
        except (ValueError, TypeError, RecursionError) as error:  # nested as deep as can be read, or not JSON's
            self.error = InvalidRequest(f"the row's other fields cannot be written as JSON: {error}")
            self.carried = {}
            return encode(self._output(token_ids))

    def _output(self, token_ids: bool) -> Fields:
        row = {name: value for name, value in self.carried.items() if name not in OWN_FIELDS}
        self._reshape(row)
        done = self.results
        last = None if self.error else done[-1]
        row["id"], row["index"] = self.id, self.index
        row["text"] = last.text if last else None
        row["steps"] = sum(r.steps for r in done)
        row["converged"] = bool(last) and all(r.converged for r in done)
        row["forward_tokens"] = sum(r.forward_tokens for r in done)
        row["finish_reason"] = last.finish_reason if last else "error"
        row["seconds"] = round(sum(r.seconds for r in done), 4)
        if token_ids:
            row["token_ids"] = last.token_ids if last else []
        if self.shape in ("turns", "fastchat"):
            names = (*RESULT_FIELDS, "token_ids") if token_ids else RESULT_FIELDS
            row["answers"] = [{name: getattr(r, name) for name in names} for r in done]
            for answer in row["answers"]:
                answer["seconds"] = round(answer["seconds"], 4)
        row["error"] = {"type": type(self.error).__name__, "message": str(self.error)} if self.error else None
        return row

    def _reshape(self, row: Fields) -> None:
        """Puts the refined answers where the format of the input has its answers; an error row has none, lest its drafts be
        taken for them."""
        name = {"alpaca-eval": "generator", "fastchat": "model_id"}.get(self.shape)
        if name and isinstance(row.get(name), str):
            row[name] += REFINED
        if self.shape == "alpaca-eval":
            row["output"] = None if self.error else self.results[0].text
        elif self.shape == "fastchat" and self.error:
            row.pop("choices", None)
        elif self.shape == "fastchat":
            texts = iter([result.text for result in self.results])
            row["choices"] = [{**c, "turns": [next(texts) for _ in c["turns"]]} for c in row["choices"]]
        elif self.shape == "batch" and self.error:
            row["response"] = None
        elif self.shape == "batch":
            row["response"] = _with_answers(row["response"], [result.text for result in self.results])


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def encode(row: Fields) -> bytes:
    """A row as a line of JSON. Raises ValueError, TypeError or RecursionError where JSON has no form for it."""
    try:
        return f"{_ENCODER.encode(row)}\n".encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON has only as an escape
        return f"{json.dumps(row, allow_nan=False)}\n".encode()


def parse_row(raw: RawRow, index: int, questions: Questions | None = None) -> Row:
    """The row at ``index`` of the input; one that cannot be used has its error set."""
    row = Row(index, index)
    try:
        _fill(row, raw(), questions)
    except InvalidRequest as error:
        row.error = error
    except RecursionError:  # from showing a value, in a message, that is nested just short of what json.loads takes
        row.error = InvalidRequest("the row is nested too deeply")
    return row


def _fill(row: Row, fields: Fields, questions: Questions | None) -> None:
    plain = any(fields.get(name) is not None for name in REQUEST_FIELDS)
    row.shape = "plain" if plain else next((shape for name, shape in _SHAPES.items() if name in fields), "plain")
    consumed = ("id", "turns", "drafts") if row.shape == "turns" else ("id", *REQUEST_FIELDS)
    row.carried = {name: value for name, value in fields.items() if name not in consumed}
    name = "id" if row.shape == "plain" or fields.get("id") is not None else "question_id"
    name = _IDS.get(row.shape, name)
    identity = fields.get(name)
    if isinstance(identity, str | int) and not isinstance(identity, bool):
        row.id = identity
    elif identity is not None:
        raise InvalidRequest(f"{name} must be a string or an integer, got {kind_of(identity)}")
    if row.shape == "fastchat":
        row.turns = _fastchat_turns(fields, questions)
    elif row.shape == "batch":
        row.turns = _batch_turns(fields, questions)
    elif row.shape == "turns":
        row.turns = _turns("turns", fields["turns"], "drafts", fields.get("drafts"))
    elif row.shape == "alpaca-eval":
        if fields.get("input"):
            raise InvalidRequest("the row has instruction and input: join them into instruction")
        row.turns = [Turn(_request("instruction", fields["instruction"], "output", fields.get("output")))]
    elif plain:
        row.turns = [Turn(Request(**{name: fields[name] for name in REQUEST_FIELDS if name in fields}))]
    else:
        got = f"the fields {sorted(map(str, fields))[:8]}" if fields else "an empty object"
        raise InvalidRequest(
            f"a row needs prompt, messages or prompt_ids (or instruction, turns or choices, see --help), got {got:.300}"
        )


def _turns(name: str, questions: object, drafts_name: str, drafts: object) -> list[Turn]:
    """The turns of one conversation."""
    if not isinstance(questions, list) or not questions:
        raise InvalidRequest(f"{name} must be a non-empty list of texts, got {kind_of(questions)}")
    if drafts is None:
        drafts = []
    if not isinstance(drafts, list):
        raise InvalidRequest(f"{drafts_name} must be a list of texts, got {kind_of(drafts)}")
    if len(drafts) > len(questions):
        raise InvalidRequest(f"got {len(drafts)} {drafts_name} for {len(questions)} {name}: at most one each")
    padded = drafts + [None] * (len(questions) - len(drafts))
    return [
        Turn(_request(f"{name}[{i}]", question, f"{drafts_name}[{i}]", draft), first=i == 0)
        for i, (question, draft) in enumerate(zip(questions, padded, strict=True))
    ]


def _request(name: str, prompt: object, draft_name: str, draft: object) -> Request:
    for what, value in ((name, prompt), (draft_name, draft)):
        if not isinstance(value, str) and not (what is draft_name and value is None):
            raise InvalidRequest(f"{what} must be a string, got {kind_of(value)}")
    try:
        return Request(prompt=prompt, draft=draft)  # type: ignore[arg-type]
    except InvalidRequest as error:  # says prompt and draft
        raise InvalidRequest(f"{name}, {draft_name}: {error}") from None


def _fastchat_turns(fields: Fields, questions: Questions | None) -> list[Turn]:
    if questions is None:
        raise InvalidRequest("a row with choices, FastChat's format, needs its questions: give --questions FILE")
    key, choices = fields.get("question_id"), fields["choices"]
    if not isinstance(key, str | int) or key not in questions:
        raise InvalidRequest(f"question_id must name one of the {len(questions)} questions, got {key!r:.80}")
    if not isinstance(choices, list) or not choices:
        raise InvalidRequest(f"choices must be a non-empty list, got {kind_of(choices)}")
    turns = []
    for i, choice in enumerate(choices):
        if not isinstance(choice, dict):
            raise InvalidRequest(f'choices[{i}] must be {{"turns": [text, ...], ...}}, got {kind_of(choice)}')
        drafts = choice.get("turns")
        if not isinstance(drafts, list) or not drafts:
            raise InvalidRequest(f"choices[{i}].turns must be a non-empty list of texts, got {kind_of(drafts)}")
        asked = questions[key][: len(drafts)]
        turns += _turns(f"turns of question {key}", asked, f"choices[{i}].turns", drafts)
    return turns


def _batch_turns(fields: Fields, questions: Questions | None) -> list[Turn]:
    """Every choice of a chat completion by itself."""
    if questions is None:
        raise InvalidRequest(
            "a row with custom_id, a batch's result, needs what was asked: give --questions BATCH_INPUT"
        )
    key, response = fields["custom_id"], fields.get("response")
    if not isinstance(key, str) or key not in questions:
        raise InvalidRequest(f"custom_id must name one of the {len(questions)} requests, got {key!r:.80}")
    body = response.get("body") if isinstance(response, dict) else None
    status = response.get("status_code") if isinstance(response, dict) else None
    if fields.get("error") is not None or status != 200 or not isinstance(body, dict):
        raise InvalidRequest(f"the batch has no answer to it: status {status}, error {fields.get('error')!r:.300}")
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        raise InvalidRequest(f"response.body.choices must be a non-empty list, got {kind_of(choices)}")
    turns = []
    for i, choice in enumerate(choices):
        message = choice.get("message") if isinstance(choice, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str):
            raise InvalidRequest(f"response.body.choices[{i}].message.content must be a string, got {kind_of(content)}")
        turns.append(Turn(Request(messages=questions[key], draft=content)))
    return turns


def _with_answers(response: Fields, texts: list[str | None]) -> Fields:
    body = response["body"]
    choices = [
        {**choice, "message": {**choice["message"], "content": text}}
        for choice, text in zip(body["choices"], texts, strict=True)
    ]
    model = {"model": body["model"] + REFINED} if isinstance(body.get("model"), str) else {}
    return {**response, "body": {**body, **model, "choices": choices}}
