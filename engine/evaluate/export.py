"""Base and refined answers in the formats that public judges read: AlpacaEval, FastChat's MT-bench, HH-RLHF."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.evaluate.results import Results, write_whole
from engine.evaluate.variants import GIVEN
from engine.job.rows import REFINED, encode
from engine.job.source import Fields

Rows = Sequence[Fields]
_HUMAN, _ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "


def export(folder: Path, form: str, output: Path, variant: str) -> list[str]:
    """Writes the files of a format; lines that say what is in them. Raises ValueError, OSError."""
    rows = Results.read(folder).variant(variant)
    names = names_of(rows, variant)
    output.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[Rows, dict[str, str], Path], list[str]]] = {
        "alpaca_eval": _alpaca_eval,
        "fastchat": _fastchat,
        "hh_rlhf": _hh_rlhf,
    }
    return writers[form](rows, names, output)


def default_folder(form: str, variant: str) -> str:
    """Name of the folder that a variant's files go to."""
    return form if variant == GIVEN else f"{form}+{variant}"


def names_of(rows: Rows, variant: str) -> dict[str, str]:
    """What the refined answers of every base model go by."""
    behind = REFINED if variant == GIVEN else f"{REFINED}+{variant}"
    return {row["model"]: row["model"] + behind for row in answered(rows)}


def check_names(names: dict[str, str]) -> None:
    """Raises ValueError where two sides have the same name, or the same file's."""
    owners: dict[str, str] = {}
    sides = [(model, f"{model!r}") for model in names]
    sides += [(name, f"the refined answers of {model!r}, {name!r}") for model, name in names.items()]
    for name, side in sides:
        other = owners.setdefault(file_name(name), side)
        if other != side:
            raise ValueError(
                f"{other} and {side} would share the name or file {file_name(name)!r}, and no verdict could tell them apart: "
                "evaluate an input whose models have other names"
            )


def answered(rows: Rows) -> list[Fields]:
    """The rows that have both sides' texts, scored or not."""
    return [row for row in rows if row["answers"] is not None and row["drafts"]]


def by_model(rows: Rows) -> dict[str, list[Fields]]:
    """Rows by base model; of several drafts of one prompt by the same model the first."""
    models: dict[str, dict[str, Fields]] = {}
    for row in answered(rows):
        models.setdefault(row["model"], {}).setdefault(row["group"], row)
    return {model: list(mine.values()) for model, mine in models.items()}


def single_turn(row: Fields) -> bool:
    """Whether it is one user's turn alone."""
    return len(row["turns"]) == 1 and not row["history"]


def question_ids(rows: Rows) -> dict[str, int]:
    """FastChat's question_id by group: the rows' own where these name every prompt once, else counted from 1."""
    own: dict[str, set[Any]] = {}
    for row in rows:
        if row["turns"]:
            own.setdefault(row["group"], set()).add(row["id"])
    ids = {group: next(iter(found)) for group, found in own.items()}
    usable = all(len(found) == 1 for found in own.values()) and len(set(ids.values())) == len(ids)
    if usable and all(isinstance(value, int) for value in ids.values()):
        return ids
    return {group: number for number, group in enumerate(own, 1)}


def transcript(row: Fields, answer: str) -> str | None:
    """HH-RLHF's form of the chat up to the first answer; None where it has a role that format doesn't know."""
    text = ""
    for message in [*row["history"], {"role": "user", "content": row["turns"][0]}]:
        if message["role"] not in ("user", "assistant"):
            return None
        text += (_HUMAN if message["role"] == "user" else _ASSISTANT) + message["content"]
    return text + _ASSISTANT + answer


def file_name(model: str) -> str:
    """A model's name as part of a file's."""
    return re.sub(r"[^\w.+-]", "_", model)


def _alpaca_eval(rows: Rows, names: dict[str, str], output: Path) -> list[str]:
    check_names(names)
    said = []
    for model, mine in by_model(rows).items():
        fit = [row for row in mine if single_turn(row)]
        if len(fit) < len(mine):
            said.append(f"{model}: {len(mine) - len(fit)} conversations of several turns left out")
        for name, column in ((model, "drafts"), (names[model], "answers")):
            outputs = [
                {
                    "instruction": row["turns"][0],
                    "output": row[column][0],
                    "generator": name,
                    "dataset": row["category"] or "",
                }
                for row in fit
            ]
            path = output / f"{file_name(name)}.json"
            write_whole(path, (json.dumps(outputs, ensure_ascii=False, indent=1) + "\n").encode())
            said.append(f"{path}: {len(outputs)} answers")
    return said


def _fastchat(rows: Rows, names: dict[str, str], output: Path) -> list[str]:
    check_names(names)
    ids, said = question_ids(rows), []
    asked: dict[int, Fields] = {}
    (output / "model_answer").mkdir(exist_ok=True)
    for model, mine in by_model(rows).items():
        fit = [row for row in mine if not row["history"]]
        if len(fit) < len(mine):
            said.append(f"{model}: {len(mine) - len(fit)} chats with a history left out")
        for row in fit:
            number = ids[row["group"]]
            asked[number] = {
                "question_id": number,
                "category": row["category"] or "general",
                "turns": row["turns"],
            }
        for name, column in ((model, "drafts"), (names[model], "answers")):
            lines: list[Fields] = [
                {
                    "question_id": ids[row["group"]],
                    "answer_id": hashlib.blake2b(f"{name}/{row['group']}".encode(), digest_size=11).hexdigest(),
                    "model_id": name,
                    "choices": [{"index": 0, "turns": row[column]}],
                    "tstamp": 0.0,
                }
                for row in fit
            ]
            path = output / "model_answer" / f"{file_name(name)}.jsonl"
            write_whole(path, b"".join(encode(line) for line in sorted(lines, key=lambda line: line["question_id"])))
            said.append(f"{path}: {len(lines)} answers")
    questions = [asked[number] for number in sorted(asked)]
    write_whole(output / "question.jsonl", b"".join(encode(question) for question in questions))
    return [*said, f"{output / 'question.jsonl'}: {len(questions)} questions"]


def _hh_rlhf(rows: Rows, names: dict[str, str], output: Path) -> list[str]:
    """Both sides' transcripts, and pairs decided by the rewards of the first turn."""
    sides: dict[str, list[Fields]] = {"base": [], "refined": []}
    pairs: list[Fields] = []
    ties = left_out = 0
    for row in answered(rows):
        texts = {"base": transcript(row, row["drafts"][0]), "refined": transcript(row, row["answers"][0])}
        if None in texts.values():
            left_out += 1
            continue
        for side, text in texts.items():
            model = names[row["model"]] if side == "refined" else row["model"]
            sides[side].append({"index": row["index"], "model": model, "transcript": text})
        rewards = {"base": (row["base_rewards"] or [None])[0], "refined": (row["rewards"] or [None])[0]}
        if None in rewards.values() or rewards["base"] == rewards["refined"]:
            ties += 1
            continue
        better, worse = sorted(texts, key=lambda side, r=rewards: -r[side])  # type: ignore[misc]
        pairs.append(
            {
                "chosen": texts[better],
                "rejected": texts[worse],
                "score_chosen": rewards[better],
                "score_rejected": rewards[worse],
                "index": row["index"],
                "chosen_side": better,
            }
        )
    for name, lines in (*sides.items(), ("pairs", pairs)):
        write_whole(output / f"{name}.jsonl", b"".join(encode(line) for line in lines))
    return [
        f"{output}: {len(sides['base'])} transcripts of each side, {len(pairs)} pairs of first answers by reward "
        f"({ties} ties or without a reward, {left_out} with roles the format has not, left out)"
    ]
