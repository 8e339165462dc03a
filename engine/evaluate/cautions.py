"""What a reader of the figures should be told: each sentence is there only if the data call for it."""

from typing import Any

from engine.evaluate.results import Results, compared

FEW_PROMPTS = 30
"""Below this percentile intervals are rough."""
ONE_SIDED = 0.9
"""Share of cases with the longer answer on one side, above which zero length difference lies outside the data."""
Figures = dict[str, Any]
_DRAFTLESS = ("alone", "shuffled", "random")


def main_cautions(made: Figures, results: Results) -> list[str]:
    """About base against refined."""
    main = made["variants"][made["main"]]
    count, notes = main["compared"], []
    if main["prompts"] < FEW_PROMPTS:
        notes.append(f"Only {main['prompts']} prompts: the intervals are rough, and narrower than they should be.")
    if "reason" in main["lc_win_rate"]:
        notes.append(f"No length-controlled win rate: {main['lc_win_rate']['reason']}.")
    else:
        notes += [
            f"The refined answer is {side} in {main[side]} of {count} cases: equal lengths are outside the "
            "data, and the length-controlled win rate is an extrapolation."
            for side in ("longer", "shorter")
            if main[side] > ONE_SIDED * count
        ]
    base, refined = main["unscored"]["base"], main["unscored"]["refined"]
    if base["cases"] or refined["cases"]:
        notes.append(
            f"Without a reward, so in no figure: {refined['cases']} refined answers ({refined['empty']} empty) and "
            f"{base['cases']} drafts ({base['empty']} empty). The side that has more of them looks better than it is."
        )
    if main["cut"] or main["drafts_cut"]:
        notes.append(
            f"Cut at the length limit: {main['cut']} refined answers and {main['drafts_cut']} drafts of {count}. What a cut "
            "text would have earned is not known; a scorer that punishes missing ends punishes the side cut more often."
        )
    if not results.record["setting"]["limit"]["drafts_cut"]:
        notes.append(
            "Drafts may be longer than the limit of the refined answers: the two sides had not the same limit."
        )
    check = made["scorer_check"]
    if check:
        share = check["agreement"]
        notes.append(
            f"The scorer orders {100 * share['mean']:.0f} % ({100 * share['low']:.0f} to {100 * share['high']:.0f}) of "
            f"{check['pairs']} pairs of drafts as the rewards in the input do (50 %: chance)."
        )
    if "callable" in results.record["setting"]["scorer"]:
        notes.append("The scorer is a Python function: whether its number is a reward is for its author to show.")
    notes.append("A reward model prefers what it prefers: a gain under the one a refiner was trained on says little.")
    return notes


def controls_text(results: Results, made: Figures) -> list[str]:
    """What the controls say about the draft."""
    main, notes = made["main"], []
    options = results.record["variants"][main]["options"]
    whole = options["steps"] is None and not options["keep_prefix"]
    for name in _DRAFTLESS:
        one = made["against"].get(name)
        if not one or not one["compared"]:
            continue
        same, count = one["same_text"], one["compared"]
        if same == count:
            notes.append(
                f"{name}: all {count} answers are the same texts as {main}'s. The draft changed the speed alone."
            )
        else:
            notes.append(f"{name}: {count - same} of {count} answers differ from {main}'s.{_why(results, made, name)}")
    if whole and options["condition"] is None:
        sampled = "Sampling with fixed noise" if options["temperature"] else "Greedy Jacobi iteration"
        notes.append(
            f"{sampled} has one fixed point, the refiner's own answer: run to convergence it does not depend on the draft, so "
            f"{main} has to equal alone, shuffled and random, and its gain over the base is that of the refiner's own answers. "
            "What steps, keep_prefix or condition keep of a draft is in their rows."
        )
    elif options["condition"] is not None:
        notes.append(
            "The draft stands in the prompt, so other drafts are other prompts; alone has the prompt without it."
        )
    if len(made["against"]) > 1:
        notes.append(
            f"{len(made['against'])} variants are compared at once: the second interval of the reward holds for all together."
        )
    return notes


def _why(results: Results, made: Figures, name: str) -> str:
    options = results.record["variants"][made["main"]]["options"]
    if options["steps"] is not None or options["keep_prefix"] or options["condition"] is not None:
        return ""  # as it should be
    main = {row["index"]: row for row in compared(results.rows[made["main"]])}
    others = [row for row in compared(results.rows[name]) if row["index"] in main]
    apart = [row for row in others if row["answers"] != main[row["index"]]["answers"]]
    open_ones = sum(not (row["converged"] and main[row["index"]]["converged"]) for row in apart)
    rest = len(apart) - open_ones
    reason = (
        " Converged answers must be equal in exact arithmetic: near-ties of two tokens fell differently."
        if rest
        else ""
    )
    return f" {open_ones} of them had not converged.{reason}"
