"""Which options are accepted, and what the refusals say."""

import math
from typing import Any

import pytest

from engine import RefineOptions
from engine.options import DEFAULT_CONDITION

REFUSED: list[tuple[str, list[Any]]] = [
    ("steps", [0, -1, 1.0, True, "1"]),
    ("keep_prefix", [-1, 1.0, None, True]),
    ("max_new_tokens", [0, -1, 2.0, None, False]),
    ("block_size", [0, -1, 2.0, None]),
    ("window", [0, -1, "wide", 2.0, None, True]),
    ("realign", [1, 0, None, "yes"]),
    ("temperature", [-0.1, math.nan, math.inf, "1", None, True]),
    ("top_p", [0, 0.0, 1.01, -1, math.nan, "1", None, True]),
    ("seed", [-1, 1.0, None, True, 2**63, 2**70]),
    ("condition", ["", "{prompt}", "{draft}", "{prompt}{draft}{x}", "{prompt}{draft}{", "{prompt}{draft}{}", 7,
                   "{prompt!r}{draft}", "{prompt:>1000000000}{draft}",
                   "{prompt}{draft}}", "{prompt.a}{draft}", "{prompt:{width}}{draft}", "{prompt:d}{draft}",
                   "{prompt!z}{draft}"]),
]  # fmt: skip
ACCEPTED: dict[str, list[Any]] = {
    "steps": [None, 1, 500],
    "keep_prefix": [0, 12],
    "max_new_tokens": [1, 10**6],
    "window": ["auto", 1, 1000],
    "temperature": [0, 0.0, 1, 0.7, 100.0],
    "top_p": [1, 1.0, 0.5, 1e-9],
    "seed": [0, 2**63 - 1],
    "condition": [None, DEFAULT_CONDITION, "{draft}{prompt}{draft}", "{{x}} {prompt} {draft}"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED for value in values])
def test_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} .*got|{name} is not a valid template"):
        RefineOptions(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ACCEPTED.items() for value in values])
def test_accepted(name: str, value: Any) -> None:
    assert getattr(RefineOptions(**{name: value}), name) == value


def test_options_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        RefineOptions().steps = 3  # type: ignore[misc]
