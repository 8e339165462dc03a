"""What is evaluated: a prompt, or the turns of a conversation, with one base model's draft answers.

Input rows are those of ``engine.job`` (prompt and draft, turns and drafts, AlpacaEval's outputs, FastChat's answers, batch
results) and trajectory rows, whose every response is a draft; the best of them by reward is what overlaps are taken with.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from engine.errors import EngineError, InvalidRequest
from engine.job.questions import Questions
from engine.job.rows import Row, Turn, parse_row
from engine.job.source import Fields, Source, kind_of
from engine.trajectories.schema import (
    Response,
    TrajectoryRow,
    checked_reward,
    checked_text,
    error_fields,
    parse_response,
    prompt_key,
    without_repeats,
)

NAMELESS = "base"
"""Name of the base model where a row has none."""
Chat = list[dict[str, str]]
_IDS = ("id", "question_id", "custom_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One conversation with the drafts of one base model; with ``error`` it takes no part, but is counted."""

    index: int
    """Number of the case."""
    id: str | int
    """The row's, or its number."""
    own_id: bool = False
    """Whether the row brought one."""
    prompt: str = ""
    """The first user's turn, as people read it."""
    group: str = ""
    """Which prompt it is: the same for the drafts of all base models. Intervals draw these."""
    history: Chat = field(default_factory=list)
    """Messages before the first turn that is refined."""
    turns: list[str] = field(default_factory=list)
    drafts: list[str] = field(default_factory=list)
    """One for each turn, cut to the length limit where there is one for both sides."""
    cut: list[bool] = field(default_factory=list)
    """Whether a draft fills the limit, so that it has no end of turn, or was cut before."""
    whole: bool = True
    """Whether all drafts are as long as in the row."""
    model: str = NAMELESS
    category: str | None = None
    best: str | None = None
    """The best response known to the only turn, cut like the drafts."""
    best_cut: bool = False
    given_reward: float | None = None
    """The draft's, by whoever judged the input file."""
    best_given_reward: float | None = None
    draft_seconds: float | None = None
    """What the base model took for the drafts, where the row says so."""
    error: dict[str, Any] | None = None

    def chat(self, turn: int, answers: list[str]) -> Chat:
        """Messages up to a turn, behind ``answers`` to the turns before it."""
        messages = list(self.history)
        for question, answer in zip(self.turns[:turn], answers, strict=False):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": self.turns[turn]}]


def read_cases(
    source: Source, questions: Questions | None, cut: Callable[[str], tuple[str, bool]], per_prompt: int | None = None
) -> list[Case]:
    """The cases of a file; a row that cannot be evaluated is one with an error. ``per_prompt``: at most so many drafts of a
    prompt, beginning with another base model for each. Raises OSError."""
    cases: list[Case] = []
    for number, raw in enumerate(source.read()):
        fields: Fields = {}
        try:
            fields = raw()
            made = list(_cases_of(fields, number, questions))
        except (EngineError, RecursionError) as error:
            made = [Case(index=0, id=_id_shown(fields, number), error=error_fields(error))]
        cases += [_limited(case, cut) for case in made]
    if per_prompt is not None:
        cases = _spread(cases, per_prompt)
    return [replace(case, index=index) for index, case in enumerate(cases)]


def _limited(case: Case, cut: Callable[[str], tuple[str, bool]]) -> Case:
    kept = [cut(draft) for draft in case.drafts]
    best, fills = (None, False) if case.best is None else cut(case.best)
    drafts = [text for text, _ in kept]
    cuts = [full or before for (_, full), before in zip(kept, case.cut or [False] * len(kept), strict=True)]
    whole = drafts == case.drafts
    return replace(case, drafts=drafts, cut=cuts, whole=whole, best=best, best_cut=fills or case.best_cut)


def _id_shown(fields: Fields, number: int) -> str | int:
    """Of a row with an error: what it calls itself, if that can be shown, or its number."""
    for name in ("id", "question_id", "custom_id", "prompt_id"):
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and value.isprintable():
            return value
    return number


def _spread(cases: list[Case], per_prompt: int) -> list[Case]:
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group if case.error is None else f"error {len(groups)}", []).append(case)
    return [
        mine[(turn * per_prompt + i) % len(mine)]
        for turn, mine in enumerate(groups.values())
        for i in range(min(per_prompt, len(mine)))
    ]


def _cases_of(fields: Fields, number: int, questions: Questions | None) -> Iterator[Case]:
    known = _known(fields)
    if known is not None and fields.get("draft") is None:
        yield from _of_trajectory(fields, known, number)
        return
    row = parse_row(lambda: fields, number, questions)
    if row.error:
        raise row.error
    own_id = any(fields.get(name) is not None for name in (("id",) if row.shape == "plain" else _IDS))
    if isinstance(row.id, str):
        checked_text("id", row.id)
    category, model = _first_text(fields, "category", "source", "dataset"), _model(fields)
    best = None if known is None else _best(known)
    for turns in _conversations(row):
        requests = [turn.request for turn in turns]
        drafts = [request.draft for request in requests if request.draft is not None]
        if not drafts or requests[0].prompt_ids is not None:
            raise InvalidRequest(
                "a case needs its prompt and at least one draft, both as text: there is nothing to compare"
            )
        without = next((i for i, request in enumerate(requests[: len(drafts)], 1) if request.draft is None), None)
        if without is not None:
            raise InvalidRequest(
                f"turn {without} of {len(requests)} has no draft, but a later one has: only the last turns may be without, as "
                "every draft is compared behind the answers before it; give that draft, or leave the later ones out"
            )
        messages = requests[0].messages or [{"role": "user", "content": requests[0].prompt or ""}]
        asked = [messages[-1]["content"], *(request.prompt or "" for request in requests[1:])][: len(drafts)]
        single = len(asked) == 1
        yield Case(
            index=0,
            id=row.id,
            own_id=own_id,
            prompt=asked[0],
            group=prompt_key("\n".join([*(m["content"] for m in messages[:-1]), *asked])),
            history=[dict(message) for message in messages[:-1]],
            turns=asked,
            drafts=drafts,
            model=model,
            category=category,
            best=best.text if best and single else None,
            best_cut=best is not None and single and best.truncated,
            best_given_reward=best.reward if best and single else None,
            given_reward=checked_reward("reward", fields.get("reward")),
            draft_seconds=checked_reward("draft_seconds", fields.get("draft_seconds")),
        )


def _conversations(row: Row) -> list[list[Turn]]:
    starts = [i for i, turn in enumerate(row.turns) if turn.first]
    return [row.turns[start:end] for start, end in zip(starts, [*starts[1:], len(row.turns)], strict=True)]


def _known(fields: Fields) -> TrajectoryRow | None:
    """The responses that a row has, each text once."""
    responses = fields.get("responses")
    if not isinstance(responses, list):
        return None
    made = [parse_response(value, f"responses[{i}]") for i, value in enumerate(responses)]
    return without_repeats(TrajectoryRow(prompt_id=0, prompt="", responses=[r for r in made if r.text.strip()]))


def _best(row: TrajectoryRow) -> Response | None:
    judged = [response for response in row.responses if response.reward is not None]
    return max(judged, key=lambda response: response.reward or 0.0, default=None)


def _of_trajectory(fields: Fields, row: TrajectoryRow, number: int) -> Iterator[Case]:
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if not row.responses:
        raise InvalidRequest("the row has no response to refine")
    best = _best(row)
    for response in row.responses:
        request = {"messages": messages} if messages is not None else {"prompt": prompt}
        asked: Fields = {**request, "draft": response.text, "id": fields.get("prompt_id")}
        parsed = parse_row(lambda asked=asked: asked, number)  # type: ignore[misc]
        if parsed.error:
            raise parsed.error
        if isinstance(parsed.id, str):
            checked_text("prompt_id", parsed.id)
        chat = parsed.turns[0].request.messages or [{"role": "user", "content": prompt or ""}]
        yield Case(
            index=0,
            id=parsed.id,
            own_id=fields.get("prompt_id") is not None,
            prompt=chat[-1]["content"],
            group=prompt_key("\n".join(message["content"] for message in chat)),
            history=[dict(message) for message in chat[:-1]],
            turns=[chat[-1]["content"]],
            drafts=[response.text],
            cut=[response.truncated],
            model=response.model,
            category=_first_text(fields, "category", "source", "dataset"),
            best=best.text if best else None,
            best_cut=best is not None and best.truncated,
            given_reward=response.reward,
            best_given_reward=best.reward if best else None,
        )


def _first_text(fields: Fields, *names: str) -> str | None:
    """Raises InvalidTrajectory for a text that cannot be written."""
    return next((checked_text(name, fields[name]) for name in names if isinstance(fields.get(name), str)), None)


def _model(fields: Fields) -> str:
    body = (fields.get("response") or {}).get("body") if isinstance(fields.get("response"), dict) else None
    name = _first_text(fields, "model", "generator", "model_id") or (
        _first_text(body, "model") if isinstance(body, dict) else None
    )
    if fields.get("model") is not None and not isinstance(fields["model"], str):
        raise InvalidRequest(f"model must be a string, got {kind_of(fields['model'])}")
    return name or NAMELESS
