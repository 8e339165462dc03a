"""Rewards of one side's answers, case after case in a file of its own, so that a run goes on where it ended."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.evaluate.cases import Case
from engine.job.book import open_book
from engine.job.output import read_finished, read_record
from engine.job.rows import encode
from engine.trajectories.schema import Response, TrajectoryRow, error_fields, prompt_key
from engine.trajectories.score import GROUP_ROWS, Scorer, ScoringFailed
from engine.trajectories.sources import transcript

Rewards = list["float | None"]
Key = tuple[str, str]
NO_REWARD = "NoReward"
"""Type of the error of an answer that the scorer gives no number for."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What one side wrote."""

    suffix: str | None
    """Behind the base model's name; None: these are not the answers that a file of rewards means by that name."""
    texts: list[str]
    """One per turn."""
    truncated: list[bool]
    """Which of them have no end of turn."""


@dataclass(slots=True)
class Scoring:
    """Scores sides with one scorer; a text that stood behind the same chat before keeps its reward, so that identical answers
    tie whatever the numerics of a batch."""

    folder: Path
    cases: Sequence[Case]
    identity: dict[str, Any]
    """What identifies the scorer."""
    load: Callable[[], Scorer]
    check: Callable[[], None]
    retry_errors: bool = False
    _known: dict[Key, float] = field(default_factory=dict)
    _scorer: Scorer | None = None

    def side(self, name: str, answers: dict[int, Answers]) -> dict[int, dict[str, Any]]:
        """By case: ``rewards``, one per turn, None where the scorer has none, and ``error``, also for what has none. Raises
        Refused, OSError."""
        path = self.folder / f"{name}.scores.jsonl"
        settings = {
            "input": {"digest": _digest(answers)},
            "scorer": self.identity,
            "plan": {"concurrency": 1},
        }
        before, _ = read_record(path)
        same_scorer = before is not None and before.get("scorer") == self.identity
        if same_scorer:
            self._remember(path, answers)
        # other answers, such as those of --retry-errors, begin a new file; what they share with the old one is known
        anew = same_scorer and before is not None and before["input"] != settings["input"]
        with open_book(path, settings, anew, self.retry_errors) as book:
            due = [index for index in answers if index not in book.done]
            if due:
                book.begin(all_kept=False)
            for start in range(0, len(due), GROUP_ROWS):
                self.check()
                for index, rewards, error in self._scored(due[start : start + GROUP_ROWS], answers):
                    line = {
                        "rewards": rewards,
                        "answers": _digest({index: answers[index]}),
                        "index": index,
                        "error": error_fields(error) if error else _missing(rewards, answers[index]),
                    }
                    book.write(index, encode(line))
                book.flush()
            book.finish(len(answers))
        self._remember(path, answers)
        return {row.index: row.fields for row in read_finished(path)}

    def _remember(self, path: Path, answers: dict[int, Answers]) -> None:
        for row in read_finished(path) if path.exists() else ():
            if row.index not in answers:
                continue
            if row.fields["answers"] != _digest({row.index: answers[row.index]}):
                continue
            keys = self._keys(row.index, answers[row.index])
            for key, reward in zip(keys, row.fields["rewards"], strict=False):
                if reward is not None:
                    self._known.setdefault(key, reward)

    def _keys(self, index: int, answers: Answers) -> list[Key]:
        case = self.cases[index]
        return [
            (json.dumps(case.chat(turn, answers.texts)), f"{cut} {text.strip()}")
            for turn, (text, cut) in enumerate(zip(answers.texts, answers.truncated, strict=True))
        ]

    def _scored(
        self, group: list[int], answers: dict[int, Answers]
    ) -> Iterator[tuple[int, Rewards, EngineError | None]]:
        """A failure of several cases is narrowed down to the ones that cause it."""
        try:
            rewards = self._rewards(group, answers)
        except ScoringFailed as error:
            if len(group) == 1:
                yield group[0], [None] * len(answers[group[0]].texts), error
                return
            for index in group:
                yield from self._scored([index], answers)
            return
        for index in group:
            yield index, rewards[index], None

    def _rewards(self, group: list[int], answers: dict[int, Answers]) -> dict[int, Rewards]:
        keys = {index: self._keys(index, answers[index]) for index in group}
        due: dict[Key, tuple[TrajectoryRow, Response]] = {}
        for index in group:
            for turn, key in enumerate(keys[index]):
                if key not in self._known and key not in due and answers[index].texts[turn].strip():
                    due[key] = _pending(self.cases[index], answers[index], turn)
        if due:
            if self._scorer is None:
                self._scorer = self.load()
            given = self._scorer.score(list(due.values()))
            for value in given:
                if value is not None and not math.isfinite(value):
                    raise ScoringFailed(f"the scorer gave {value}: not a finite number")
            found = {key: value for key, value in zip(due, given, strict=True) if value is not None}
            self._known.update(found)
        return {index: [self._known.get(key) for key in keys[index]] for index in group}


def _missing(rewards: Rewards, answers: Answers) -> dict[str, Any] | None:
    """The error of answers without a reward."""
    without = [text for text, reward in zip(answers.texts, rewards, strict=True) if reward is None]
    if not without:
        return None
    why = "it is empty" if not without[0].strip() else "the scorer has none for it, which may be too long"
    return error_fields(f"an answer has no reward: {why}", NO_REWARD)


def _pending(case: Case, answers: Answers, turn: int) -> tuple[TrajectoryRow, Response]:
    messages = case.chat(turn, answers.texts)
    single = len(messages) == 1
    prompt = messages[0]["content"] if single else transcript(messages)
    row = TrajectoryRow(
        # the number of a row without an id may be another row's id in a file of rewards
        prompt_id=case.id if case.own_id else prompt_key(prompt),
        prompt=prompt,
        messages=None if single else messages,
    )
    model = "" if answers.suffix is None else case.model + answers.suffix
    return row, Response(model=model, text=answers.texts[turn], truncated=answers.truncated[turn])


def _digest(answers: dict[int, Answers]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for index, one in answers.items():
        digest.update(json.dumps([index, one.suffix, one.texts, one.truncated]).encode())
    return digest.hexdigest()
