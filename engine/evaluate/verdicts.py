"""Verdicts of public judges on exported answers, brought back to the cases they are about."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import InvalidRequest
from engine.evaluate.export import answered, by_model, check_names, names_of, question_ids, single_turn, transcript
from engine.evaluate.results import JUDGES, Results, write_whole
from engine.evaluate.variants import GIVEN
from engine.job.rows import encode
from engine.job.source import Fields, open_regular

Rows = Sequence[Fields]


class Unusable(ValueError):
    """A verdict on our answers that says nothing: no preference, an error of the judge."""


def import_verdicts(folder: Path, form: str, path: str, name: str | None, variant: str) -> tuple[list[str], int]:
    """Writes FOLDER/judges/NAME.jsonl, a row per verdict; what was found, and how many verdicts could not be used.

    Rows: index (of the case), variant, turn, preference (for the refined answer, 0 .. 1), base_score and score where the
    judge gives scores. Raises ValueError where no verdict is about this folder's answers, OSError.
    """
    rows = Results.read(folder).variant(variant)
    readers = {"alpaca_eval": _alpaca_eval, "fastchat": _fastchat, "hh_rlhf": _hh_rlhf}
    found: list[Fields] = []
    others = unusable = 0
    for verdict in readers[form](Judged(rows, names_of(rows, variant)), _read(path)):
        if isinstance(verdict, dict):
            found.append({**verdict, "variant": variant, "format": form, "judge_file": Path(path).name})
        elif isinstance(verdict, Unusable):
            unusable += 1
        else:
            others += 1
    if not found:
        raise ValueError(
            f"{path}: none of its {others + unusable} verdicts is a usable one about the answers of {variant} in {folder}: "
            "give the --variant that was exported, and the --format"
        )
    judge = name or Path(path).name.split(".")[0] + ("" if variant == GIVEN else f"+{variant}")
    if not re.fullmatch(r"[\w.+-]+", judge):
        raise ValueError(f"--name must be letters, digits and . _ + -, got {judge!r}")
    (folder / JUDGES).mkdir(exist_ok=True)
    written = folder / JUDGES / f"{judge}.jsonl"
    write_whole(written, b"".join(encode(row) for row in found))
    line = f"{written}: {len(found)} verdicts, {unusable} that say nothing, {others} about other answers"
    return [line, f"engine.evaluate report {folder} shows them"], unusable


@dataclass(frozen=True, slots=True)
class Judged:
    """What verdicts can be about."""

    rows: Rows
    names: dict[str, str]
    """By base model, what its refined answers go by."""


Found = Fields | Unusable | None
"""A verdict; one that says nothing; one about something else."""


def _read(path: str) -> Iterator[Fields | Unusable]:
    for raw in open_regular(path).read():
        try:
            yield raw()
        except InvalidRequest as error:
            yield Unusable(str(error))


def _verdict(row: Fields, turn: int | None, preference: float | None, base: Any = None, refined: Any = None) -> Fields:
    drafts, answers = row["drafts"], row["answers"]
    if turn is not None:
        drafts, answers = drafts[turn - 1 : turn], answers[turn - 1 : turn]
    return {
        "index": row["index"],
        "group": row["group"],
        "model": row["model"],
        "category": row["category"],
        "turn": turn,
        "preference": preference,
        "base_score": base,
        "score": refined,
        "base_length": sum(len(text.strip()) for text in drafts),
        "length": sum(len(text.strip()) for text in answers),
    }


def _alpaca_eval(judged: Judged, read: Iterator[Fields | Unusable]) -> Iterator[Found]:
    """annotations.json: preference 1 for output_1, 2 for output_2, between them how sure the judge was; 0 is a draw. Where
    the texts leave open whose they are, generator_1 and generator_2 say it."""
    known: dict[tuple[str, str, str], list[Fields]] = {}
    for row in answered(judged.rows):
        if single_turn(row):
            key = (row["turns"][0].strip(), row["drafts"][0].strip(), row["answers"][0].strip())
            known.setdefault(key, []).append(row)
    for one in read:
        if isinstance(one, Unusable):
            yield one
            continue
        question, first, second = (str(one.get(name, "")).strip() for name in ("instruction", "output_1", "output_2"))
        candidates = [(row, False) for row in known.get((question, first, second), ())]
        candidates += [(row, True) for row in known.get((question, second, first), ())]
        if not candidates:
            yield None
            continue
        generators = one.get("generator_1"), one.get("generator_2")
        by_name = [
            (row, swapped)
            for row, swapped in candidates
            if generators == _ordered(row["model"], judged.names[row["model"]], swapped)
        ]
        matched, swapped = (by_name or candidates)[0]
        given = one.get("preference")
        if not isinstance(given, int | float) or not (given == 0 or 1 <= given <= 2):
            yield Unusable(f"preference {given!r}")
            continue
        for_second = 0.5 if given == 0 else given - 1
        yield _verdict(matched, None, 1 - for_second if swapped else for_second)


def _ordered(base: str, refined: str, swapped: bool) -> tuple[str, str]:
    return (refined, base) if swapped else (base, refined)


Known = dict[tuple[int, str], tuple[Fields, bool]]
"""By question_id and name the row, and whether the name is that of the refined answers."""


def _fastchat(judged: Judged, read: Iterator[Fields | Unusable]) -> Iterator[Found]:
    """Single scores (score -1: the judge failed) and pairs: as FastChat counts them, a verdict that changes with the order of
    the answers is a tie."""
    check_names(judged.names)
    ids = question_ids(judged.rows)
    known: Known = {}
    for model, mine in by_model(judged.rows).items():
        for row in mine:
            if not row["history"]:
                known[ids[row["group"]], model] = row, False
                known[ids[row["group"]], judged.names[model]] = row, True
    scores: dict[tuple[int, str, int], dict[bool, float]] = {}
    for one in read:
        if isinstance(one, Unusable):
            yield one
        elif "g1_winner" in one:
            yield _pair(one, known)
        else:
            yield from _single(one, known, scores)


def _single(one: Fields, known: Known, scores: dict[tuple[int, str, int], dict[bool, float]]) -> Iterator[Found]:
    """A verdict once both sides' scores are there."""
    number, turn, score = _whole(one.get("question_id")), _whole(one.get("turn")), one.get("score")
    row, refined = _find(known, number, one.get("model"))
    if row is None or number is None or turn is None or turn not in range(1, len(row["turns"]) + 1):
        yield None
        return
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score) or score < 0:
        yield Unusable(f"score {score!r}")
        return
    sides = scores.setdefault((number, row["model"], turn), {})
    before = len(sides)
    sides[refined] = float(score)
    if len(sides) == 2 and before == 1:
        preference = (1 + (sides[True] > sides[False]) - (sides[True] < sides[False])) / 2
        yield _verdict(row, turn, preference, sides[False], sides[True])


def _pair(one: Fields, known: Known) -> Found:
    number, turn = _whole(one.get("question_id")), _whole(one.get("turn"))
    (row, refined), (other, other_refined) = (_find(known, number, one.get(name)) for name in ("model_1", "model_2"))
    if row is None or row is not other or refined == other_refined or turn not in range(1, len(row["turns"]) + 1):
        return None
    first, second = one.get("g1_winner"), one.get("g2_winner")
    if any(winner not in ("model_1", "model_2", "tie") for winner in (first, second)):
        return Unusable(f"winners {first!r}, {second!r}")
    if first == "tie" or first != second:
        return _verdict(row, turn, 0.5)
    return _verdict(row, turn, float(refined if first == "model_1" else other_refined))


def _find(known: Known, number: int | None, name: object) -> tuple[Fields | None, bool]:
    """The row of a question whose base or refined answers go by a name."""
    return known.get((number, name), (None, False)) if number is not None and isinstance(name, str) else (None, False)


def _whole(value: object) -> int | None:
    """A whole number, also one that some writer made a float; None: it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        return None
    return int(value)


def _hh_rlhf(judged: Judged, read: Iterator[Fields | Unusable]) -> Iterator[Found]:
    """Rows of chosen and rejected: whichever of a case's two first answers was chosen."""
    known: dict[tuple[str, str], tuple[Fields, float]] = {}
    for row in answered(judged.rows):
        base, refined = (transcript(row, row[side][0]) for side in ("drafts", "answers"))
        if base is not None and refined is not None and base.strip() != refined.strip():
            known.setdefault((refined.strip(), base.strip()), (row, 1.0))
            known.setdefault((base.strip(), refined.strip()), (row, 0.0))
    for one in read:
        if isinstance(one, Unusable):
            yield one
            continue
        match = known.get((str(one.get("chosen")).strip(), str(one.get("rejected")).strip()))
        yield None if match is None else _verdict(match[0], 1, match[1])
