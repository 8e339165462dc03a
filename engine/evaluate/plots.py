"""Pictures of a report: reward after every number of steps, by category, against length, and under the controls."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.evaluate.results import Results, compared
from engine.evaluate.statistics import FEWEST

STEPS, CATEGORIES, LENGTHS, CONTROLS = "steps.png", "categories.png", "lengths.png", "controls.png"
_BASE, _REFINED = "#888888", "#1f77b4"


def draw(results: Results, figures: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Writes what there is something to draw of; the names of the files, and what went wrong with others, which are not
    there. Raises ImportError without matplotlib."""
    import matplotlib.figure  # noqa: F401

    made, failed = [], []
    for name, picture in ((STEPS, _steps), (CATEGORIES, _categories), (LENGTHS, _lengths), (CONTROLS, _controls)):
        path = results.folder / name
        path.unlink(missing_ok=True)
        try:
            if picture(results, figures, path):
                made.append(name)
        except Exception as error:  # matplotlib's, of a text or number it cannot draw
            path.unlink(missing_ok=True)
            failed.append(f"no {name}: {type(error).__name__}: {error}")
    return made, failed


def _label(text: str) -> str:
    """A text as it stands: matplotlib would read what is between two dollars as a formula."""
    return text.replace("$", r"\$")


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _steps(results: Results, figures: dict[str, Any], path: Path) -> bool:
    points = sorted(
        (int(name.partition("-")[2]), one["reward"])
        for name, one in figures["variants"].items()
        if name.startswith("steps-") and one.get("reward")
    )
    main = figures["variants"][figures["main"]]
    if not points or not main.get("reward"):
        return False
    figure, axes = _figure(4)
    points = [(0, main["base_reward"]), *points]
    x = [step for step, _ in points]
    axes.plot(x, [one["mean"] for _, one in points], "o-", color=_REFINED, label="after so many steps (0: the draft)")
    if all(one["prompts"] >= FEWEST for _, one in points):
        axes.fill_between(
            x,
            [one["low"] for _, one in points],
            [one["high"] for _, one in points],
            alpha=0.2,
            color=_REFINED,
            linewidth=0,
        )
    end = main["reward"]
    axes.axhline(
        end["mean"], color="black", linestyle="--", label=f"{figures['main']}: {main['steps']['mean']:.1f} steps"
    )
    if end["prompts"] >= FEWEST:
        axes.axhspan(end["low"], end["high"], color="black", alpha=0.08)
    axes.set_xticks(x)
    axes.set(xlabel="Jacobi steps", ylabel="mean reward", title="Reward per step, with 95 % intervals over prompts")
    axes.legend()
    figure.savefig(path, dpi=110)
    return True


def _forest(items: Sequence[tuple[str, dict[str, Any]]], title: str, path: Path) -> bool:
    if not items:
        return False
    figure, axes = _figure(1.4 + 0.32 * len(items))
    for place, (_, one) in enumerate(reversed(items)):
        enough = one["prompts"] >= FEWEST
        if enough:
            axes.plot([one["low"], one["high"]], [place, place], color=_REFINED, linewidth=2)
        axes.plot(one["mean"], place, "o", color=_REFINED, markerfacecolor=_REFINED if enough else "white")
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(items)), [_label(name) for name, _ in reversed(items)])
    axes.set(xlabel="difference of reward", title=title)
    figure.savefig(path, dpi=110)
    return True


def _categories(results: Results, figures: dict[str, Any], path: Path) -> bool:
    items = [
        (f"{name} ({one['prompts']} prompts)", one["difference_together"])
        for name, one in figures["categories"].items()
        if one.get("difference_together")
    ]
    return _forest(items, "Refined minus base by category; 95 % intervals for all of them together", path)


def _controls(results: Results, figures: dict[str, Any], path: Path) -> bool:
    items = [
        (name, one["difference_together"]) for name, one in figures["against"].items() if one.get("difference_together")
    ]
    return _forest(items, f"Variant minus {figures['main']}; 95 % intervals for all of them together", path)


def _lengths(results: Results, figures: dict[str, Any], path: Path) -> bool:
    rows = compared(results.rows[figures["main"]])
    if not rows:
        return False
    figure, axes = _figure(4)
    axes.scatter(
        [row["length"] - row["base_length"] for row in rows],
        [row["reward"] - row["base_reward"] for row in rows],
        s=14, alpha=0.6, color=_REFINED, edgecolors="none",
    )  # fmt: skip
    axes.axhline(0, color=_BASE, linewidth=1)
    axes.axvline(0, color=_BASE, linewidth=1)
    title = "Every case: does the reward go with the length?"
    axes.set(xlabel="refined minus base, characters", ylabel="refined minus base, reward", title=title)
    figure.savefig(path, dpi=110)
    return True
