"""What a trajectory file holds, as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.trajectories.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(summary: Summary, path: Path) -> None:
    """Rewards by model and by level, length bias and ties. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'diffpo-engine[plot]'") from None
    figures = summary.figures()
    figure = Figure(figsize=(12, 8), layout="constrained")
    (models, levels), (lengths, ties) = figure.subplots(2, 2)
    by_reward = sorted(figures["models"].items(), key=lambda item: item[1]["mean_reward"] or 0.0)
    _draw_rewards(models, "model", by_reward)
    _draw_rewards(levels, "level, worst first", list(figures["levels"].items()))
    _draw_lengths(lengths, figures)
    _draw_ties(ties, summary)
    figure.savefig(path)


def _draw_rewards(axes: "Axes", by: str, items: list[tuple[str, dict[str, Any]]]) -> None:
    """Means, with one standard deviation to either side."""
    known = [(name, row) for name, row in items if row["mean_reward"] is not None]
    means, deviations = ([row[key] for _, row in known] for key in ("mean_reward", "reward_deviation"))
    axes.barh([name for name, _ in known], means, xerr=deviations, color="tab:blue", ecolor="black", capsize=3)
    axes.set(title=f"by {by}", xlabel="mean reward, and its deviation")


def _draw_lengths(axes: "Axes", figures: dict[str, Any]) -> None:
    bins, correlation = figures["reward_by_length"], figures["length_reward_correlation"]
    shares, above = [float(share) for share in bins], [row["reward_above_prompt"] for row in bins.values()]
    axes.plot(shares, above, color="gray")
    axes.scatter(shares, above, s=[5 + row["responses"] ** 0.5 for row in bins.values()])
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_xscale("log", base=2)
    told = "" if correlation is None else f": correlation {correlation:.2f}"
    axes.set(
        title=f"length bias{told}", xlabel="length, in shares of the mean of the prompt's responses",
        ylabel="reward above the prompt's mean",
    )  # fmt: skip


def _draw_ties(axes: "Axes", summary: Summary) -> None:
    counts = {
        "no two rewards equal": summary.compared - summary.ties,
        "ties below the best": summary.ties - summary.top_ties,
        "best reward shared": summary.top_ties,
        "nothing to compare": summary.prompts - summary.compared,
    }
    axes.bar_label(axes.barh(list(counts), list(counts.values())), padding=3)
    axes.invert_yaxis()
    axes.set(title="ties", xlabel="prompts")
