"""Options of a refinement run."""

import math
import string
from dataclasses import dataclass
from typing import Literal

DEFAULT_CONDITION = "{prompt}\n\nDraft answer:\n{draft}"
"""The ``condition`` template the shipped refiner was trained with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineOptions:
    """How answers are computed. Only ``steps``, ``keep_prefix``, ``condition``, the sampling options, ``max_new_tokens`` and
    (with ``steps``) ``block_size`` can change a result; ``window``, ``concurrency`` and ``realign`` change only how fast it is
    reached."""

    steps: int | None = None
    """Jacobi steps per block, after which the iterate is returned as it is. None: iterate to the fixed point, which is the
    refiner's own greedy (or, with a temperature, sequentially sampled) answer whatever the draft."""
    keep_prefix: int = 0
    """Leading draft tokens that are kept as they are."""
    max_new_tokens: int = 256
    """Longest answer in tokens, EOS and kept prefix included."""
    window: int | Literal["auto"] = "auto"
    """Rows computed per sequence and step. "auto" chooses from the batch, the device and the acceptance seen so far. With
    ``steps`` every step computes the whole block."""
    concurrency: int | None = None
    """Sequences that window="auto" reckons with. None: those that run at the time; then steps and forward_tokens of a
    request depend on what else runs. With a number they are its own, like its answer."""
    realign: bool = True
    """Look for the newly accepted tokens in the draft, in earlier iterates and in the answer, and continue the guess from
    there: after an insertion or deletion the rest of a draft is right at shifted positions."""
    condition: str | None = None
    """Template with {prompt} and {draft} that becomes the user's message, so that the answer depends on the draft."""
    temperature: float = 0.0
    """0: greedy. Above: sampling, with the noise of every (seed, position, token) fixed in advance."""
    top_p: float = 1.0
    """Sample from the smallest set of most probable tokens that holds this mass."""
    seed: int = 0
    """Seed of the sampling noise, below 2**63; a request can bring its own. Requests with the same seed share their noise:
    for several samples of one prompt give each its seed."""
    block_size: int = 256
    """With ``steps``: response positions iterated together (N in the paper); longer answers continue block after block."""

    def __post_init__(self) -> None:
        _check_integer("steps", self.steps, 1, optional=True)
        _check_integer("keep_prefix", self.keep_prefix, 0)
        _check_integer("max_new_tokens", self.max_new_tokens, 1)
        _check_integer("block_size", self.block_size, 1)
        _check_integer("concurrency", self.concurrency, 1, optional=True)
        _check_integer("seed", self.seed, 0)
        if self.seed >= 2**63:
            raise ValueError(f"seed must be an integer in 0 .. 2**63 - 1, got {self.seed!r}")
        if self.window != "auto":
            _check_integer("window", self.window, 1)
        if not isinstance(self.realign, bool):
            raise ValueError(f"realign must be True or False, got {self.realign!r}")
        if not _is_number(self.temperature) or self.temperature < 0 or math.isinf(self.temperature):
            raise ValueError(f"temperature must be a finite number >= 0 (0 is greedy), got {self.temperature!r}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if self.condition is not None:
            check_condition(self.condition)


def check_condition(template: str) -> None:
    """Raises ValueError unless the template uses {prompt} and {draft} and nothing else."""
    try:
        parts = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(template)]
    except (ValueError, TypeError) as error:
        raise ValueError(f"condition is not a valid template ({error}), got {template!r}") from None
    fields = {name for name, _, _ in parts if name is not None}
    if any(spec or conversion for _, spec, conversion in parts):  # a width could ask for any amount of memory
        raise ValueError(f"condition takes {{prompt}} and {{draft}} without a format or conversion, got {template!r}")
    if fields != {"prompt", "draft"}:
        raise ValueError(
            f"condition must contain the fields {{prompt}} and {{draft}} and no others, got {sorted(fields)} in {template!r}"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _check_integer(name: str, value: object, least: int, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        allowed = (
            f"an integer >= {least}" + (" or None" if optional else "") + (' or "auto"' if name == "window" else "")
        )
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
