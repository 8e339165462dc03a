"""The loss curves of a training run, as a picture."""

import json
from pathlib import Path
from typing import Any

from engine.training.checkpoint import checkpoints

PICTURE, _LOG = "loss.png", "trainer_state.json"
_TITLES = {"ar": "cross entropy of the best response", "consistency": "consistency loss, without omega"}


def plot_run(output: Path) -> Path:
    """Draws both terms over the steps, as logged and as evaluated, into the run's folder; of an unfinished run what its
    last checkpoint has. Raises ValueError where there is nothing to draw or no matplotlib, OSError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'diffpo-engine[plot]'") from None
    log = read_log(output)
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (term, title) in zip(figure.subplots(1, 2), _TITLES.items(), strict=True):
        for prefix, label, style in (("", "training", "-"), ("eval_", "evaluation", "o--")):
            steps, values = curve(log, prefix + term)
            if steps:
                axes.plot(steps, values, style, label=label)
        axes.set(title=title, xlabel="optimiser step", ylabel="nats per token")
        axes.grid(alpha=0.3)
        axes.legend()
    picture = output / PICTURE
    figure.savefig(picture, dpi=100)
    return picture


def read_log(output: Path) -> list[dict[str, Any]]:
    """The lines that a run, or its last checkpoint, has logged. Raises ValueError where there are none, OSError."""
    if not output.is_dir():
        raise ValueError(f"--plot {output} is no folder: give the output of a training run")
    found = next((folder for folder in (output, *reversed(checkpoints(output))) if (folder / _LOG).exists()), None)
    if found is None:
        raise ValueError(f"--plot {output} has no finished run and no checkpoint: give the output of a training run")
    log: list[dict[str, Any]] = json.loads((found / _LOG).read_text(encoding="utf-8"))["log_history"]
    if not any("ar" in line or "eval_ar" in line for line in log):
        raise ValueError(f"--plot {output}: nothing was logged yet in {found / _LOG}: train on, or lower log_every")
    return log


def curve(log: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one of its figures."""
    points = [(line["step"], line[name]) for line in log if name in line]
    return [step for step, _ in points], [value for _, value in points]
