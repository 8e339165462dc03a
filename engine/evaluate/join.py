"""One row per case and variant: both sides' answers and rewards, and everything that is measured of them."""

from typing import Any

from engine.evaluate.cases import Case
from engine.evaluate.overlap import word_similarity
from engine.evaluate.scores import NO_REWARD, Answers, Rewards
from engine.job.source import Fields

ByIndex = dict[int, dict[str, Any]]


def joined(
    case: Case,
    variant: str,
    refined: Fields | None,
    answers: Answers | None,
    scores: dict[str, ByIndex],
    scored: dict[str, Any] | None,
) -> Fields:
    """The row: ``refined`` is the job's, ``answers`` what was scored of it, None where it has an error. With an ``error`` it
    has no comparison. A case's reward is the mean over its turns, lengths are characters of all its answers, overlaps are of
    words (1: the same)."""
    row: Fields = {
        "index": case.index, "id": case.id, "variant": variant, "group": case.group, "model": case.model,
        "category": case.category, "prompt": case.prompt, "history": case.history, "turns": case.turns,
        "drafts": case.drafts, "drafts_cut": case.cut, "best": case.best, "given_reward": case.given_reward,
        "best_given_reward": case.best_given_reward, "draft_seconds": case.draft_seconds,
    }  # fmt: skip
    base = scores["drafts"].get(case.index, {})
    row |= _measured(case, refined, answers)
    row["base_rewards"] = base.get("rewards", [])
    row["rewards"] = (scored or {}).get("rewards", [])
    row["base_reward"], row["reward"] = _mean(row["base_rewards"]), _mean(row["rewards"])
    row["best_reward"] = _mean(scores["best"].get(case.index, {}).get("rewards", []))
    row["base_length"] = sum(len(text.strip()) for text in case.drafts)
    row["error"] = case.error or (refined or {}).get("error") or base.get("error") or (scored or {}).get("error")
    if row["error"] is None and (row["reward"] is None or row["base_reward"] is None):
        row["error"] = {
            "type": NO_REWARD,
            "message": "the scorer has no reward for an answer: too long for it, or empty",
        }
    row["preference"] = None if row["error"] else _preference(row["reward"], row["base_reward"])
    return row


def _measured(case: Case, refined: Fields | None, answers: Answers | None) -> Fields:
    if refined is None or answers is None:
        return {"answers": None, "length": None}
    turns, texts = refined.get("answers") or [refined], answers.texts
    return {
        "answers": texts,
        "length": sum(len(text.strip()) for text in texts),
        "identical": [text.strip() for text in texts] == [draft.strip() for draft in case.drafts],
        "tokens": sum(len(turn["token_ids"]) for turn in turns),
        "steps": refined["steps"],
        "forward_tokens": refined["forward_tokens"],
        "converged": refined["converged"],
        "cut": any(answers.truncated),
        "seconds": refined["seconds"],
        "overlap_draft": _overlap(texts, case.drafts),
        "overlap_best": None if case.best is None else _overlap(texts, [case.best]),
        "draft_overlap_best": None if case.best is None else _overlap(case.drafts, [case.best]),
    }


def _overlap(a: list[str], b: list[str]) -> float:
    pairs = list(zip(a, b, strict=True))
    return round(sum(word_similarity(one, other) for one, other in pairs) / len(pairs), 4)


def _mean(values: Rewards) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _preference(reward: float, base: float) -> float:
    return 0.5 if reward == base else float(reward > base)
