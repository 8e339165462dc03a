"""Puts rewards to the responses of a trajectory file: row after row, in order, so that a run goes on where it ended."""

import hashlib
import importlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from engine.errors import EngineError, InvalidRequest, InvalidTrajectory
from engine.job.book import open_book
from engine.job.report import REPORT_SECONDS
from engine.job.rows import encode
from engine.job.settings import checkpoint_digest
from engine.job.source import Source, open_regular
from engine.trajectories.schema import (
    BadRow,
    Response,
    TrajectoryRow,
    checked_reward,
    checked_text,
    error_fields,
    parse_row,
    prompt_key,
    read_checked,
    usable_ids,
    without_repeats,
)

GROUP_ROWS = 32
"""Rows whose responses share batches: always the same ones, wherever a run was resumed, so that no reward depends on that."""


class ScoringFailed(EngineError):
    """A scorer gave no usable rewards for a row; the others go on."""


Scored = list["float | None"]
Pending = list[tuple[TrajectoryRow, Response]]


class Scorer(Protocol):
    """Gives rewards."""

    def score(self, pending: Pending) -> Scored:
        """One reward for each response, None where it has none. Raises ScoringFailed."""
        ...


class FileScorer:
    """Rewards that a file has: trajectory rows, or rows of prompt_id or prompt, model or text, and reward.

    A reward of a response's text goes before one of its model, whichever names the prompt; a response whose model is "" has
    rewards by its text alone.
    """

    def __init__(self, source: Source, say: Callable[[str], None]) -> None:
        self._known: dict[tuple[str, str], float] = {}
        for number, raw in enumerate(source.read()):
            try:
                self._add(raw())
            except (InvalidRequest, InvalidTrajectory) as error:
                say(f"left out: {BadRow(source.path, number, str(error))}")
        if not self._known:
            raise ValueError(f"{source.path} holds no reward: see --help for its rows")

    def _add(self, fields: dict[str, Any]) -> None:
        if "responses" in fields:
            row = parse_row(fields)
            prompts = [str(row.prompt_id), prompt_key(row.prompt)]
            given = [(_text_key(response.text), response.reward) for response in row.responses]
        else:
            prompts = [] if fields.get("prompt_id") is None else [str(usable_ids(fields["prompt_id"], ""))]
            if fields.get("prompt") is not None:
                prompts.append(prompt_key(checked_text("prompt", fields["prompt"])))
            if not prompts or all(fields.get(name) is None for name in ("model", "text")):
                raise InvalidTrajectory("a reward needs prompt_id or prompt, and model or text")
            # the text says more than the model, which may have answered twice
            name = "text" if fields.get("text") is not None else "model"
            value = checked_text(name, fields[name])
            given = [(_text_key(value) if name == "text" else value, checked_reward("reward", fields.get("reward")))]
        self._known.update({(prompt, key): value for prompt in prompts for key, value in given if value is not None})

    def score(self, pending: Pending) -> Scored:
        rewards: Scored = []
        for row, response in pending:
            names = [_text_key(response.text), *([response.model] if response.model else [])]
            keys = [(prompt, name) for name in names for prompt in (str(row.prompt_id), prompt_key(row.prompt))]
            rewards.append(next((self._known[key] for key in keys if key in self._known), None))
        return rewards


def _text_key(text: str) -> str:
    return "text " + hashlib.blake2b(text.strip().encode(), digest_size=12).hexdigest()


class CallableScorer:
    """A Python function of a prompt and a list of responses that returns their rewards."""

    def __init__(self, name: str) -> None:
        module, _, attribute = name.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"--callable must be module:function that can be imported, got {name!r}: {error}"
            ) from error
        if not callable(function):
            raise ValueError(f"--callable {name!r} is a {type(function).__name__}, not a function")
        self._function: Callable[[str, list[str]], Any] = function

    def score(self, pending: Pending) -> Scored:
        rewards: Scored = [None] * len(pending)
        by_row: dict[int, list[int]] = {}
        for i, (row, _) in enumerate(pending):
            by_row.setdefault(id(row), []).append(i)
        for places in by_row.values():
            row = pending[places[0]][0]
            try:
                given = list(self._function(row.prompt, [pending[i][1].text for i in places]))
                values = [None if value is None else float(value) for value in given]
            except Exception as error:  # the user's own code, and it costs this row only
                raise ScoringFailed(f"the callable failed: {type(error).__name__}: {error}") from error
            if len(values) != len(places):
                raise ScoringFailed(f"the callable gave {len(values)} rewards for {len(places)} responses: one each")
            for i, value in zip(places, values, strict=True):
                rewards[i] = value
        return rewards


SCORER_DEFAULTS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "batch_size": 8, "max_length": None, "trust_remote_code": False
}  # fmt: skip
"""Options of a reward model."""


def choose_scorer(
    reward_model: str | None,
    rewards: str | None,
    function: str | None,
    options: dict[str, Any],
    say: Callable[[str], None],
) -> tuple[dict[str, Any], Callable[[], Scorer]]:
    """What identifies the one of three scorers that is given, and what gives it; ``options`` are those of SCORER_DEFAULTS.

    A file or a function is loaded here, and of a reward model everything but its weights looked at, so that what is wrong
    with it shows before any work. Raises ValueError, OSError, EngineError."""
    if rewards is not None:
        source = open_regular(rewards)
        known = FileScorer(source, say)
        return {"rewards": source.digest}, lambda: known
    if function is not None:
        called = CallableScorer(function)
        return {"callable": function}, lambda: called
    from engine.weights import resolve_checkpoint

    if reward_model is None:
        raise ValueError("there is no scorer: give a reward model, a file of rewards or a callable")
    folder = resolve_checkpoint(reward_model)
    identity = {"model": checkpoint_digest(folder), "dtype": options["dtype"], "max_length": options["max_length"]}

    from engine.trajectories.reward_model import RewardModel

    RewardModel.check(folder, device=options["device"], trust_remote_code=options["trust_remote_code"])
    return identity, lambda: RewardModel.load(folder, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What to score with what."""

    source: Source
    output: Path
    scorer: dict[str, Any]
    """What identifies the scorer, for the record beside the output."""
    again: bool = False
    """Also responses that have a reward."""
    overwrite: bool = False
    retry_errors: bool = False

    def run(self, load: Callable[[], Scorer], say: Callable[[str], None], check: Callable[[], None]) -> int:
        """Completes the output; the error rows in it. Raises Refused, OSError, EngineError."""
        settings = {
            "input": {"digest": self.source.digest},
            "scorer": self.scorer,
            "options": {"again": self.again},
            "plan": {"concurrency": 1},
        }
        with open_book(self.output, settings, self.overwrite, self.retry_errors) as book:
            rows = errors = missing = 0
            scorer: Scorer | None = None
            told = time.monotonic()
            for group in self._groups():
                check()
                rows += len(group)
                if all(number in book.done for number, _ in group):
                    continue
                if scorer is None:
                    scorer = load()
                    book.begin(all_kept=False)
                for number, fields in self._scored(scorer, group):
                    if number in book.done:
                        continue
                    errors += fields["error"] is not None
                    missing += sum(response["reward"] is None for response in fields.get("responses", ()))
                    book.write(number, encode(fields))
                book.flush()
                if time.monotonic() - told >= REPORT_SECONDS:
                    told = time.monotonic()
                    say(f"{rows} rows, {errors} errors")
            errors += book.errors
            book.finish(rows)
        say(
            f"{self.output}: {rows} rows, {book.done.count} of an earlier run, {errors} errors, {missing} without a reward"
        )
        return errors

    def _groups(self) -> Iterator[list[tuple[int, TrajectoryRow | BadRow]]]:
        group: list[tuple[int, TrajectoryRow | BadRow]] = []
        for item in read_checked(self.source, parse_row):
            group.append(item)
            if len(group) == GROUP_ROWS:
                yield group
                group = []
        if group:
            yield group

    def _scored(
        self, scorer: Scorer, group: list[tuple[int, TrajectoryRow | BadRow]]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        good = {number: without_repeats(row) for number, row in group if isinstance(row, TrajectoryRow)}
        todo = [
            (number, i)
            for number, row in good.items()
            for i, response in enumerate(row.responses)
            if response.text.strip() and (self.again or response.reward is None)
        ]
        failed: dict[int, EngineError] = {}
        given = self._rewards(scorer, good, todo, failed)
        for number, row in group:
            if isinstance(row, BadRow):
                yield number, {"index": number, "error": error_fields(row.error)}
                continue
            row = good[number]
            new = [
                replace(response, reward=given.get((number, i), None if self.again else response.reward))
                for i, response in enumerate(row.responses)
            ]
            error = error_fields(failed[number]) if number in failed else None
            yield number, {**replace(row, responses=new).fields(), "index": number, "error": error}

    def _rewards(
        self,
        scorer: Scorer,
        rows: dict[int, TrajectoryRow],
        todo: list[tuple[int, int]],
        failed: dict[int, EngineError],
    ) -> dict[tuple[int, int], float | None]:
        """Rewards by row and place; a failure of several rows is narrowed down to the row that causes it."""
        if not todo:
            return {}
        try:
            given = scorer.score([(rows[number], rows[number].responses[i]) for number, i in todo])
            for (number, _), value in zip(todo, given, strict=True):
                if value is not None and not math.isfinite(value):
                    raise ScoringFailed(f"the scorer gave {value} for a response of row {number}: not a finite number")
        except ScoringFailed as error:
            numbers = sorted({number for number, _ in todo})
            if len(numbers) == 1:
                failed[numbers[0]] = error
                return {}
            parts = [[item for item in todo if item[0] == number] for number in numbers]
            return {key: value for part in parts for key, value in self._rewards(scorer, rows, part, failed).items()}
        return dict(zip(todo, given, strict=True))
