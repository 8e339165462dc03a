"""From the rows of a folder to its figures. Nothing here runs a model."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from engine.evaluate.results import Results, compared
from engine.evaluate.statistics import DRAWS, LEVEL, Estimate, length_controlled_win_rate, paired_bootstrap
from engine.evaluate.variants import GIVEN
from engine.job.source import Fields

Rows = Sequence[Fields]
Figures = dict[str, Any]
MOST_DRAWS = 20000
LEAST_PROMPTS = 10
"""Below this no length-controlled win rate: two coefficients of so few comparisons are noise."""


def figures(results: Results) -> Figures:
    """Everything the report shows, as JSON has it."""
    main = GIVEN if GIVEN in results.rows else next(iter(results.rows))
    rows = results.rows[main]
    others = {name: mine for name, mine in results.rows.items() if name != main}
    return {
        "main": main,
        "variants": {
            name: summary(mine, drafted=results.record["variants"][name]["guess"] != "none")
            for name, mine in results.rows.items()
        },
        "against": {name: against(mine, rows, len(others)) for name, mine in others.items()},
        "categories": parts(rows, "category"),
        "models": parts(rows, "model"),
        "scorer_check": scorer_check(rows),
        "judges": {name: judged(verdicts) for name, verdicts in results.judges.items()},
    }


def estimate(rows: Rows, value: Callable[[Fields], float | None], at_once: int = 1) -> Figures | None:
    """Mean over prompts of a row's value, of the rows that have one. ``at_once``: how many intervals are to hold together
    (Bonferroni: each at level 1 - 5 % / at_once)."""
    known = [(number, row["group"]) for row in rows if (number := value(row)) is not None]
    if not known:
        return None
    values, groups = zip(*known, strict=True)
    level = 1 - (1 - LEVEL) / at_once
    return asdict(paired_bootstrap(values, groups, draws=min(MOST_DRAWS, DRAWS * at_once), level=level))


def _difference(row: Fields) -> float:
    return float(row["reward"] - row["base_reward"])


def summary(rows: Rows, *, drafted: bool = True) -> Figures:
    """Base against refined, of one variant; ``drafted``: whether it has to wait for a draft."""
    good = compared(rows)
    made: Figures = {
        "cases": len(rows),
        "compared": len(good),
        "prompts": len({row["group"] for row in good}),
        "errors": dict(Counter(row["error"]["type"] for row in rows if row["error"])),
        "unscored": unscored(rows),
    }
    if not good:
        return made
    columns = {
        "base_reward": "base_reward", "reward": "reward", "best_reward": "best_reward", "win_rate": "preference",
        "base_length": "base_length", "length": "length", "tokens": "tokens", "steps": "steps",
        "forward_tokens": "forward_tokens", "overlap_draft": "overlap_draft", "overlap_best": "overlap_best",
        "draft_overlap_best": "draft_overlap_best", "draft_seconds": "draft_seconds",
    }  # fmt: skip
    made |= {name: estimate(good, lambda row, c=column: row.get(c)) for name, column in columns.items()}  # type: ignore[misc]
    made["difference"] = estimate(good, _difference)
    made["tokens_per_step"] = estimate(good, lambda row: row["tokens"] / row["steps"] if row["steps"] else None)
    made["lc_win_rate"] = length_controlled(good)
    shares: dict[str, Callable[[Fields], bool]] = {
        "ties": lambda row: row["preference"] == 0.5,
        "identical": lambda row: row["identical"],
        "longer": lambda row: row["length"] > row["base_length"],
        "shorter": lambda row: row["length"] < row["base_length"],
        "cut": lambda row: row["cut"],
        "drafts_cut": lambda row: any(row["drafts_cut"]),
        "converged": lambda row: row["converged"],
    }
    made |= {name: sum(map(test, good)) for name, test in shares.items()}
    made["seconds"] = spread([row["seconds"] for row in good])
    known = [row for row in good if row["draft_seconds"] is not None]
    whole = [row["seconds"] + (row["draft_seconds"] if drafted else 0.0) for row in known]
    made["seconds_with_draft"] = spread(whole) if len(known) == len(good) else None
    return made


def unscored(rows: Rows) -> Figures:
    """Of cases whose answers are there: by side how many have no reward, and how many of these an empty answer."""
    there = [row for row in rows if row["answers"] is not None]
    made: Figures = {}
    for side, texts, reward in (("base", "drafts", "base_reward"), ("refined", "answers", "reward")):
        without = [row for row in there if row[reward] is None]
        made[side] = {
            "cases": len(without),
            "empty": sum(any(not text.strip() for text in row[texts]) for row in without),
        }
    return made


def length_controlled(rows: Rows) -> Figures:
    """Of rows with preferences; what stands in its way under ``reason`` where there is none."""
    if len({row["group"] for row in rows}) < LEAST_PROMPTS:
        return {"reason": f"there are fewer than {LEAST_PROMPTS} prompts"}
    try:
        found: Estimate = length_controlled_win_rate(
            [row["preference"] for row in rows],
            [row["length"] for row in rows],
            [row["base_length"] for row in rows],
            [row["group"] for row in rows],
        )
    except ValueError as error:
        return {"reason": str(error)}
    return asdict(found)


def spread(values: Sequence[float]) -> Figures:
    """Quantiles of single answers."""
    median, high = np.quantile(values, (0.5, 0.9))
    return {"median": float(median), "p90": float(high), "mean": float(np.mean(values)), "count": len(values)}


def against(rows: Rows, main: Rows, at_once: int) -> Figures:
    """A variant less the main one, on the cases that both have."""
    there = {row["index"]: row for row in compared(main)}
    pairs = [(row, there[row["index"]]) for row in compared(rows) if row["index"] in there]
    made: Figures = {"compared": len(pairs)}
    if not pairs:
        return made
    made["same_text"] = sum(
        [text.strip() for text in row["answers"]] == [text.strip() for text in other["answers"]] for row, other in pairs
    )
    merged = [{**row, "difference": row["reward"] - other["reward"]} for row, other in pairs]
    made["difference"] = estimate(merged, lambda row: row["difference"])
    made["difference_together"] = estimate(merged, lambda row: row["difference"], at_once)
    made["steps_difference"] = estimate([{**r, "d": r["steps"] - o["steps"]} for r, o in pairs], lambda row: row["d"])
    return made


def parts(rows: Rows, column: str) -> dict[str, Figures]:
    """Base against refined by category or base model; intervals of each alone and of all together."""
    names = sorted({row[column] for row in rows if row[column] is not None})
    made: dict[str, Figures] = {}
    for name in names:
        mine = [row for row in rows if row[column] == name]
        good = compared(mine)
        made[name] = {"cases": len(mine), "compared": len(good), "prompts": len({row["group"] for row in good})}
        if good:
            made[name] |= {
                "base_reward": estimate(good, lambda row: row["base_reward"]),
                "reward": estimate(good, lambda row: row["reward"]),
                "difference": estimate(good, _difference),
                "difference_together": estimate(good, _difference, len(names)),
                "win_rate": estimate(good, lambda row: row["preference"]),
                "lc_win_rate": length_controlled(good),
            }
    return made


def scorer_check(rows: Rows) -> Figures | None:
    """How often the scorer orders two drafts of a prompt as whoever judged the input file did; a tie of the scorer is half."""
    groups: dict[str, list[Fields]] = {}
    for row in compared(rows):
        if row["given_reward"] is not None:
            groups.setdefault(row["group"], []).append(row)
    right = []
    for group, mine in groups.items():
        for a, b in combinations(mine, 2):
            given, scored = a["given_reward"] - b["given_reward"], a["base_reward"] - b["base_reward"]
            if given:
                right.append({"group": group, "right": 0.5 if not scored else float(given * scored > 0)})
    found = estimate(right, lambda row: row["right"])
    return None if found is None else {"agreement": found, "pairs": len(right)}


def judged(verdicts: Rows) -> Figures:
    """Of one judge's imported verdicts: preferences for the refined answer, or scores of both."""
    first = verdicts[0] if verdicts else {}
    made: Figures = {"verdicts": len(verdicts), "format": first.get("format"), "variant": first.get("variant")}
    made["win_rate"] = estimate(verdicts, lambda row: row["preference"])
    known = [row for row in verdicts if row["preference"] is not None]
    made["lc_win_rate"] = length_controlled(known) if known else None
    made["categories"] = {
        name: estimate([row for row in verdicts if row["category"] == name], lambda row: row["preference"])
        for name in sorted({row["category"] for row in verdicts if row["category"] is not None})
    }
    made["turns"] = {}
    for turn in sorted({row["turn"] for row in verdicts if row["turn"] is not None}):
        mine = [row for row in verdicts if row["turn"] == turn and row["score"] is not None]
        if mine:
            made["turns"][str(turn)] = _scores(mine)
    scored = [row for row in verdicts if row["score"] is not None]
    made["scores"] = _scores(scored) if scored else None
    return made


def _scores(rows: Rows) -> Figures:
    return {
        "base": estimate(rows, lambda row: row["base_score"]),
        "refined": estimate(rows, lambda row: row["score"]),
        "difference": estimate(rows, lambda row: row["score"] - row["base_score"]),
    }
