"""Writes bench/results/reproduction.md: the tables of reproduction.json, means over held-out prompts with 95 % intervals.

The bootstrap draws prompts, not drafts: the drafts of one prompt are no independent trials. Differences to plain fine-tuning
are taken prompt by prompt before they are averaged.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.page import write_page
from bench.reproduction.cases import CONTROLS
from bench.reproduction.measure import STEPS, Columns
from engine.evaluate.statistics import paired_bootstrap
from engine.evaluate.tables import markdown

REFERENCE = "ar"
"""The run that others are compared with."""
Values = dict[int, float]
"""One value per prompt."""
Rows = Iterable[Sequence[str]]


def by_prompt(columns: Columns, name: str, model: str | None = None) -> Values:
    """Mean of a column over each prompt's cases, of one base model or of all; empty where there is no such column."""
    cases: dict[int, list[float]] = {}
    models = columns.get("model", [None] * len(columns["prompt"]))
    for prompt, who, value in zip(columns["prompt"], models, columns.get(name, []), strict=False):
        if value is not None and model in (None, who):
            cases.setdefault(prompt, []).append(value)
    return {prompt: sum(values) / len(values) for prompt, values in cases.items()}


def ratio(above: Values, below: Values) -> Values:
    """Prompt by prompt."""
    return {prompt: above[prompt] / below[prompt] for prompt in above}


def less(a: Values, b: Values) -> Values:
    """a - b of the prompts that both have."""
    return {prompt: a[prompt] - b[prompt] for prompt in a if prompt in b}


def interval(values: Values) -> tuple[float, float, float]:
    """Mean over prompts with its 95 % interval."""
    found = paired_bootstrap(list(values.values()))
    return found.mean, found.low, found.high


def cell(values: Values, digits: int = 3) -> str:
    """Mean and interval as text; a dash where there is nothing."""
    if not values:
        return "–"
    mean, low, high = interval(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def plain_cell(values: Values, digits: int = 3) -> str:
    """The mean alone."""
    return f"{interval(values)[0]:.{digits}f}" if values else "–"


def accepted(columns: Columns, steps: str = "steps", model: str | None = None) -> Values:
    """Answer tokens per step, prompt by prompt."""
    return ratio(by_prompt(columns, "answer_tokens", model), by_prompt(columns, steps, model))


def trained(results: dict[str, Any]) -> str:
    """How every run was trained."""
    head = ["run", "omega", "drafts", "steps", "batch", "learning rate"]
    rows = []
    for run, measured in results.items():
        if "settings" in measured:
            settings, steps = measured["settings"], measured["curve"]["step"][-1]
            shown = (settings["omega"], settings["drafts"], steps, settings["batch_size"], settings["lr"])
            rows.append([run, *(f"{value:g}" for value in shown)])
    return markdown(head, rows)


def overview(results: dict[str, Any], kind: str) -> str:
    """Losses and steps of every run, from the drafts of all base models."""
    head = ["run", "AR loss", "consistency loss", "answer tokens", "steps", "tokens per step", "the same by default"]
    rows = []
    for run, measured in results.items():
        given, loss = measured["sets"][kind]["given"], measured["losses"].get(kind, {"prompt": []})
        rows.append(
            [
                run,
                cell(by_prompt(loss, "ar"), 2),
                cell(by_prompt(loss, "consistency"), 3),
                cell(by_prompt(given, "answer_tokens"), 1),
                cell(by_prompt(given, "steps"), 1),
                cell(accepted(given), 2),
                cell(accepted(given, "default_steps"), 2),
            ]
        )
    return markdown(head, rows)


def summary(results: dict[str, Any]) -> str:
    """What README shows: losses, steps and the converged answer of every run, from the drafts of all base models."""
    head = [
        "omega",
        "optimiser steps",
        "AR loss, held out",
        "consistency loss",
        "Jacobi steps",
        "similarity to the best response",
    ]
    rows = []
    for measured in results["runs"].values():
        given, loss = measured["sets"]["plain"]["given"], measured["losses"]["plain"]
        settings = measured.get("settings")
        how = (
            [f"{settings['omega']:g}", str(measured["curve"]["step"][-1])] if settings else ["not trained further", ""]
        )
        rows.append(
            [
                *how,
                cell(by_prompt(loss, "ar"), 2),
                cell(by_prompt(loss, "consistency"), 2),
                cell(by_prompt(given, "steps"), 1),
                cell(by_prompt(given, "converged_tokens")),
            ]
        )
    return markdown(head, rows).rstrip()


def similarities(results: dict[str, Any], kind: str, unit: str) -> str:
    """To the best response, step by step, from the drafts of all base models; the draft itself on top."""
    names = [*(f"after_{steps}" for steps in STEPS), "converged"]
    head = ["run", *(f"after {steps}" for steps in STEPS), "converged"]
    any_run = next(iter(results.values()))["sets"][kind]["given"]
    rows = [["(the draft itself)", cell(by_prompt(any_run, f"draft_{unit}")), *[""] * len(STEPS)]]
    for run, measured in results.items():
        given = measured["sets"][kind]["given"]
        rows.append([run, *(cell(by_prompt(given, f"{name}_{unit}")) for name in names)])
    return markdown(head, rows)


def differences(results: dict[str, Any], kind: str) -> str:
    """Every run minus plain fine-tuning, on the same prompts."""
    figures: dict[str, Callable[[Columns], Values]] = {
        "tokens per step": accepted,
        **{f"settled after {s}": lambda c, s=s: by_prompt(c, f"settled_{s}") for s in (1, 4)},  # type: ignore[misc]
        **{f"similarity after {s}": lambda c, s=s: by_prompt(c, f"after_{s}_tokens") for s in (1, 8)},  # type: ignore[misc]
        "similarity, converged": lambda c: by_prompt(c, "converged_tokens"),
    }
    reference = results[REFERENCE]["sets"][kind]["given"]
    rows = []
    for run, measured in results.items():
        if run != REFERENCE:
            given = measured["sets"][kind]["given"]
            rows.append([run, *(cell(less(of(given), of(reference))) for of in figures.values())])
    return markdown([f"run minus {REFERENCE}", *figures], rows)


def controls(results: dict[str, Any], kind: str) -> str:
    """What the draft is good for: another guess, or none, on the prompts that every run was given all of them for."""
    names = [*(f"after_{steps}_tokens" for steps in STEPS), "converged_tokens"]
    head = ["run", "guess", "tokens per step", *(f"after {steps}" for steps in STEPS), "converged"]
    rows = []
    every = (columns for measured in results.values() for columns in measured["sets"][kind].values())
    prompts = set.intersection(*(set(columns["prompt"]) for columns in every))
    for run, measured in results.items():
        sets = measured["sets"][kind]
        for control in (control for control in CONTROLS if control in sets):
            columns = sets[control]
            kept = [plain_cell({p: v for p, v in by_prompt(columns, name).items() if p in prompts}) for name in names]
            pace = {p: v for p, v in accepted(columns).items() if p in prompts}
            rows.append([run, control, cell(pace, 2), *kept])
    return markdown(head, rows)


def by_model(results: dict[str, Any], kind: str) -> str:
    """Each base model's drafts by themselves."""
    head = ["drafts of", "prompts", "run", "steps", "tokens per step", *(f"after {s}" for s in STEPS), "converged"]
    names = [*(f"after_{steps}_tokens" for steps in STEPS), "converged_tokens"]
    rows = []
    for model in sorted(set(next(iter(results.values()))["sets"][kind]["given"]["model"])):
        for run, measured in results.items():
            given = measured["sets"][kind]["given"]
            steps = by_prompt(given, "steps", model)
            similar = (plain_cell(by_prompt(given, name, model)) for name in names)
            pace = cell(accepted(given, model=model), 2)
            rows.append([model, str(len(steps)), run, plain_cell(steps, 1), pace, *similar])
    return markdown(head, rows)


def correctors(checkpoints: dict[str, dict[str, Columns]]) -> str:
    """Checkpoints that correct drafts shown in their prompt, compared with the first on the same damaged drafts."""
    reference, first = next(iter(checkpoints.items()))
    baseline = by_prompt(first["repair"], "output_vs_clean")
    head = [
        "checkpoint",
        "demo: output to draft",
        "real: output to draft",
        "damaged: draft to clean",
        "output to clean",
        f"minus {reference}",
        "better",
        "repaired",
        "cut short",
        "undamaged kept",
        "tokens per step",
    ]
    rows = []
    for name, sets in checkpoints.items():
        repairs = sets["repair"]
        cleaned = by_prompt(repairs, "output_vs_clean")
        rows.append(
            [
                name,
                *(cell(by_prompt(sets[kind], "output_vs_draft")) if kind in sets else "–" for kind in ("demo", "real")),
                plain_cell(by_prompt(repairs, "draft_vs_clean")),
                cell(cleaned),
                "" if name == reference else cell(less(cleaned, baseline)),
                *(count(repairs, column) for column in ("better", "repaired", "cut_short", "kept")),
                cell(accepted(repairs), 1),
            ]
        )
    return markdown(head, rows)


def count(columns: Columns, name: str) -> str:
    """How often a column is true, of how many."""
    known = [value for value in columns[name] if value is not None]
    return f"{sum(known)} of {len(known)}"


def report(results: dict[str, Any]) -> str:
    """All tables as Markdown."""
    runs = results["runs"]
    parts = [
        ("Runs", trained(runs)),
        ("Answers to plain prompts, from drafts of every base model", overview(runs, "plain")),
        ("Similarity of tokens to the best response", similarities(runs, "plain", "tokens")),
        ("Similarity of words to the best response", similarities(runs, "plain", "words")),
        ("Against plain fine-tuning, prompt by prompt", differences(runs, "plain")),
        ("Controls", controls(runs, "plain")),
        ("By base model", by_model(runs, "plain")),
        ("Questions of MT-bench, from drafts of four base models", overview(runs, "mt_bench")),
        ("Damaged drafts shown in the prompt", overview(runs, "repair")),
        ("Damaged drafts: similarity of tokens to the clean text", similarities(runs, "repair", "tokens")),
        ("Damaged drafts: similarity of words to the clean text", similarities(runs, "repair", "words")),
    ]
    if "correctors" in results:
        parts.append(("What ships: similarity on words, greedy answers", correctors(results["correctors"])))
    return "\n".join(f"### {title}\n\n{table}" for title, table in parts)


def main() -> None:
    """Command line."""
    write_page(__doc__.splitlines()[0], "reproduction", lambda results, path: report(results))


if __name__ == "__main__":
    main()
