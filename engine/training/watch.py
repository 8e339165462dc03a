"""When a loss is no longer one to take a step on."""

import math
import statistics
from collections import deque
from collections.abc import Sequence

_HISTORY, _LEAST_HISTORY = 50, 20


class Watch:
    """Judges each step's loss by those before it."""

    def __init__(self, omega: float, explosion: float) -> None:
        """``explosion``: how many times the median of the last 50 losses is too much; 0: nothing finite is."""
        self.omega, self.explosion = omega, explosion
        self._losses: deque[float] = deque(maxlen=_HISTORY)

    @property
    def history(self) -> list[float]:
        """The losses that the next one is judged by; kept with a checkpoint, as a run that goes on is judged by them too."""
        return list(self._losses)

    @history.setter
    def history(self, losses: Sequence[float]) -> None:
        self._losses = deque(losses, maxlen=_HISTORY)

    def problem(self, ar: float, consistency: float, norm: float) -> str | None:
        """What is wrong with a step of these terms and this norm of the gradient, in words; None: nothing."""
        for name, value in (("ar", ar), ("consistency", consistency), ("the gradient's norm", norm)):
            if not math.isfinite(value):
                return f"{name} is {value}"
        loss = ar + self.omega * consistency
        if self.explosion and len(self._losses) >= _LEAST_HISTORY:
            usual = statistics.median(self._losses)
            if loss > self.explosion * usual:
                return f"the loss is {loss:.4g}, more than explosion={self.explosion:g} times the usual {usual:.4g}"
        self._losses.append(loss)
        return None
