"""Scorers of the tests, called by name, and what they were asked."""

import os
import signal
from pathlib import Path

ASKED = "SCORER_ASKED"
"""Environment variable: a file that gets a line per text scored."""
KILL_AFTER = "SCORER_KILL_AFTER"
"""Environment variable: the process is killed once so many texts were scored."""

LATE = "SCORER_LATE"
"""Environment variable: a file that ``later`` waits for."""


def letters(prompt: str, texts: list[str]) -> list[float | None]:
    """Share of the letter e in a text, on the length of prompt and text: a function of both."""
    _note(prompt, texts)
    return [None if "worthless" in text else text.count("e") / len(text) + len(prompt) / 1000 for text in texts]


def changing(prompt: str, texts: list[str]) -> list[float]:
    """Another number every time."""
    changing.calls = getattr(changing, "calls", 0) + 1  # type: ignore[attr-defined]
    return [changing.calls + i / 100 for i in range(len(texts))]  # type: ignore[attr-defined]


def failing(prompt: str, texts: list[str]) -> list[float]:
    if "unscorable" in prompt:
        raise RuntimeError("no idea")
    return [float(len(text)) for text in texts]


def drafted(prompt: str, texts: list[str]) -> list[float | None]:
    """Nothing for answers of the stub without a draft."""
    return [None if "from None" in text else float(len(text)) for text in texts]


def later(prompt: str, texts: list[str]) -> list[float | None]:
    """Nothing for a late prompt, until a file of that name is there."""
    late = "late" in prompt and not Path(os.environ[LATE]).exists()
    return [None if late else float(len(text)) for text in texts]


def _note(prompt: str, texts: list[str]) -> None:
    file = os.environ.get(ASKED)
    if not file:
        return
    with Path(file).open("a") as asked:
        for text in texts:
            asked.write(repr((prompt, text)) + "\n")
    limit = os.environ.get(KILL_AFTER)
    if limit and len(Path(file).read_text().splitlines()) >= int(limit):
        os.kill(os.getpid(), signal.SIGKILL)
