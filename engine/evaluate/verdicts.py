"""Verdicts of public judges on exported answers, brought back to the cases they are about."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.errors import InvalidRequest
from engine.evaluate.export import answered, by_model, question_ids, single_turn, transcript
from engine.evaluate.results import JUDGES, Results, write_whole
from engine.job.rows import REFINED, encode
from engine.job.source import Fields, open_regular

Rows = Sequence[Fields]


class Unusable(ValueError):
    """A verdict on our answers that says nothing: no preference, an error of the judge."""


def import_verdicts(folder: Path, form: str, path: str, name: str | None, variant: str) -> tuple[list[str], int]:
    """Writes FOLDER/judges/NAME.jsonl, a row per verdict; what was found, and how many verdicts could not be used.

    Rows: index (of the case), turn, preference (for the refined answer, 0 .. 1), base_score and score where the judge gives
    scores. Raises ValueError where no verdict is about this folder's answers, OSError.
    """
    rows = Results.read(folder).variant(variant)
    readers = {"alpaca_eval": _alpaca_eval, "fastchat": _fastchat, "hh_rlhf": _hh_rlhf}
    found: list[Fields] = []
    others = unusable = 0
    for verdict in readers[form](rows, _read(path)):
        if isinstance(verdict, dict):
            found.append({**verdict, "format": form, "judge_file": Path(path).name})
        elif isinstance(verdict, Unusable):
            unusable += 1
        else:
            others += 1
    if not found:
        raise ValueError(
            f"{path}: none of its {others + unusable} verdicts is a usable one about the answers of {variant} in {folder}: "
            "give the --variant that was exported, and the --format"
        )
    judge = name or Path(path).name.split(".")[0]
    if not re.fullmatch(r"[\w.+-]+", judge):
        raise ValueError(f"--name must be letters, digits and . _ + -, got {judge!r}")
    (folder / JUDGES).mkdir(exist_ok=True)
    written = folder / JUDGES / f"{judge}.jsonl"
    write_whole(written, b"".join(encode(row) for row in found))
    line = f"{written}: {len(found)} verdicts, {unusable} that say nothing, {others} about other answers"
    return [line, f"engine.evaluate report {folder} shows them"], unusable


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


def _alpaca_eval(rows: Rows, read: Iterator[Fields | Unusable]) -> Iterator[Found]:
    """annotations.json: preference 1 for output_1, 2 for output_2, between them how sure the judge was; 0 is a draw."""
    known: dict[tuple[str, str, str], Fields] = {}
    for row in answered(rows):
        if single_turn(row):
            known.setdefault((row["turns"][0].strip(), row["drafts"][0].strip(), row["answers"][0].strip()), row)
    for one in read:
        if isinstance(one, Unusable):
            yield one
            continue
        question, first, second = (str(one.get(name, "")).strip() for name in ("instruction", "output_1", "output_2"))
        base_first, base_second = known.get((question, first, second)), known.get((question, second, first))
        matched = base_first or base_second
        if matched is None:
            yield None
            continue
        given = one.get("preference")
        if not isinstance(given, int | float) or not (given == 0 or 1 <= given <= 2):
            yield Unusable(f"preference {given!r}")
            continue
        for_second = 0.5 if given == 0 else given - 1
        swapped = base_first is None or (first == second and str(one.get("generator_1", "")).endswith(REFINED))
        yield _verdict(matched, None, 1 - for_second if swapped else for_second)


def _fastchat(rows: Rows, read: Iterator[Fields | Unusable]) -> Iterator[Found]:
    """Single scores (score -1: the judge failed) and pairs: as FastChat counts them, a verdict that changes with the order of
    the answers is a tie."""
    ids = question_ids(rows)
    known = {
        (ids[row["group"]], row["model"]): row for mine in by_model(rows).values() for row in mine if not row["history"]
    }
    scores: dict[tuple[int, str, int], dict[str, float]] = {}
    for one in read:
        if isinstance(one, Unusable):
            yield one
        elif "g1_winner" in one:
            yield _pair(one, known)
        else:
            yield from _single(one, known, scores)


def _single(
    one: Fields, known: dict[tuple[int, str], Fields], scores: dict[tuple[int, str, int], dict[str, float]]
) -> Iterator[Found]:
    """A verdict once both sides' scores are there."""
    number, name, turn, score = (one.get(key) for key in ("question_id", "model", "turn", "score"))
    model = str(name).removesuffix(REFINED)
    row = known.get((number, model))  # type: ignore[arg-type]
    if row is None or turn not in range(1, len(row["turns"]) + 1):
        yield None
        return
    if not isinstance(score, int | float) or score < 0:
        yield Unusable(f"score {score!r}")
        return
    sides = scores.setdefault((number, model, turn), {})  # type: ignore[arg-type]
    before = len(sides)
    sides["refined" if str(name).endswith(REFINED) else "base"] = float(score)
    if len(sides) == 2 and before == 1:
        preference = (1 + (sides["refined"] > sides["base"]) - (sides["refined"] < sides["base"])) / 2
        yield _verdict(row, turn, preference, sides["base"], sides["refined"])


def _pair(one: Fields, known: dict[tuple[int, str], Fields]) -> Found:
    names = [str(one.get("model_1")), str(one.get("model_2"))]
    turn, model = one.get("turn"), min(names, key=len)
    row = known.get((one.get("question_id"), model))  # type: ignore[arg-type]
    if row is None or sorted(names) != sorted([model, model + REFINED]) or turn not in range(1, len(row["turns"]) + 1):
        return None
    first, second = one.get("g1_winner"), one.get("g2_winner")
    if not {first, second} <= {"model_1", "model_2", "tie"}:
        return Unusable(f"winners {first!r}, {second!r}")
    if first == "tie" or first != second:
        return _verdict(row, turn, 0.5)
    winner = names[0] if first == "model_1" else names[1]
    return _verdict(row, turn, float(winner.endswith(REFINED)))


def _hh_rlhf(rows: Rows, read: Iterator[Fields | Unusable]) -> Iterator[Found]:
    """Rows of chosen and rejected: whichever of a case's two first answers was chosen."""
    known: dict[tuple[str, str], tuple[Fields, float]] = {}
    for row in answered(rows):
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
