"""What is done with the drafts: refinement as it is meant, and the controls that tell what the draft contributes."""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.evaluate.cases import Case
from engine.job.source import Fields
from engine.options import DEFAULT_CONDITION, RefineOptions

CONTROLS = ("alone", "shuffled", "random", "steps", "keep_prefix", "condition")
GIVEN = "given"
Guess = Literal["given", "none", "shuffled", "random"]
_SAME = "refiner, prompts, options, length limit and EOS rule"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to refine every case."""

    name: str
    guess: Guess
    options: RefineOptions
    changed: str
    """What differs from ``given``, in words."""
    held: str
    """What does not."""

    def fields(self) -> Fields:
        return {
            "guess": self.guess,
            "changed": self.changed,
            "held": self.held,
            "options": dataclasses.asdict(self.options),
        }


def variants(
    options: RefineOptions, controls: Sequence[str], steps: Sequence[int] = (), prefix_tokens: int = 8
) -> list[Variant]:
    """``given`` and the chosen controls. Raises ValueError for an unknown name, or options that leave one without meaning."""
    unknown = sorted(set(controls) - set(CONTROLS))
    if unknown:
        raise ValueError(f"unknown controls {unknown}: known are {', '.join(CONTROLS)}")
    made = [Variant(GIVEN, "given", options, "–", f"{_SAME}: the reference of all other rows")]
    for name in (name for name in CONTROLS if name in controls):
        made += [Variant(n, *rest) for n, *rest in _control(name, options, steps, prefix_tokens)]
    return made


def _control(name: str, options: RefineOptions, steps: Sequence[int], prefix_tokens: int) -> list[Any]:
    if name == "alone":
        alone = dataclasses.replace(options, condition=None, keep_prefix=0)
        shown = ", which is not in the prompt either" if options.condition else ""
        return [("alone", "none", alone, f"no draft{shown}: the refiner answers by itself", _SAME)]
    if name == "shuffled":
        changed = "the draft answers another prompt (by the same base model where it answered one)"
        return [("shuffled", "shuffled", options, changed, f"{_SAME}; drafts by the same writers")]
    if name == "random":
        changed = "the draft is random words, drawn from all drafts"
        return [("random", "random", options, changed, f"{_SAME}; the draft's number of words")]
    if name == "keep_prefix":
        kept = dataclasses.replace(options, keep_prefix=prefix_tokens)
        return [
            ("keep_prefix", "given", kept, f"the draft's first {prefix_tokens} tokens are kept", f"{_SAME}; drafts")
        ]
    if name == "condition":
        if options.condition is not None:
            return []  # given already is
        conditioned = dataclasses.replace(options, condition=DEFAULT_CONDITION)
        changed = "the draft also stands in the prompt, which is longer by it"
        return [
            ("condition", "given", conditioned, changed, "refiner, drafts, length limit and EOS rule; not the prompt")
        ]
    return [
        (
            f"steps-{k}",
            "given",
            dataclasses.replace(options, steps=k),
            f"stopped after {k} step{'s' if k > 1 else ''} per block of {options.block_size} tokens",
            f"{_SAME}; drafts",
        )
        for k in sorted(set(steps))
    ]


def input_rows(cases: Sequence[Case], guess: Guess, seed: int = 0) -> list[Fields]:
    """Rows for ``engine.job``, one per case without an error, with the drafts of a guess. Raises ValueError where there is no
    other prompt to take a draft from."""
    usable = [case for case in cases if case.error is None]
    pool = [word for case in usable for draft in case.drafts for word in draft.split()]
    drawn = Shuffle(usable)
    rows = []
    for case in usable:
        rng = random.Random(f"{seed}/{case.index}")
        drafts: list[str] = []
        if guess == "given":
            drafts = case.drafts
        elif guess == "random":
            drafts = [
                " ".join(rng.choices(pool, k=len(draft.split()))) if draft.split() else "" for draft in case.drafts
            ]
        elif guess == "shuffled":
            drafts = drawn.drafts_for(case, rng)
        rows.append(_row(case, drafts))
    return rows


def _row(case: Case, drafts: list[str]) -> Fields:
    if not case.history:
        return {"id": case.index, "turns": case.turns, "drafts": drafts}
    shown = {"draft": drafts[0]} if drafts else {}
    return {"id": case.index, "messages": case.chat(0, []), **shown}


class Shuffle:
    """Drafts of other prompts."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._by_model: dict[tuple[str, int], list[Case]] = {}
        for case in cases:
            for turn in range(len(case.drafts)):
                self._by_model.setdefault((case.model, turn), []).append(case)
                self._by_model.setdefault(("", turn), []).append(case)

    def drafts_for(self, case: Case, rng: random.Random) -> list[str]:
        """One draft per turn, of the same turn elsewhere; of the same base model if it answered another prompt."""
        return [self._draw(case, turn, rng) for turn in range(len(case.drafts))]

    def _draw(self, case: Case, turn: int, rng: random.Random) -> str:
        for key in ((case.model, turn), ("", turn)):
            pool = self._by_model[key]
            for _ in range(8):
                other = rng.choice(pool)
                if other.group != case.group:
                    return other.drafts[turn]
            others = [other for other in pool if other.group != case.group]
            if others:
                return rng.choice(others).drafts[turn]
        raise ValueError(
            "shuffled drafts need at least two different prompts: give more rows, or leave that control out"
        )
