"""Which requests are accepted, and what the refusals say."""

from types import MappingProxyType
from typing import Any

import pytest

from engine import InvalidRequest, Request

USER = {"role": "user", "content": "q"}
REFUSED: list[tuple[Any, str]] = [
    ({}, "exactly one of prompt, messages and prompt_ids, got none"),
    ({"prompt": "a", "messages": [USER]}, "got.*prompt.*messages"),
    ({"prompt": "a", "draft": "b", "draft_ids": [1]}, "got both"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": 3}, "prompt must be a string, got int"),
    ({"prompt": "\ud800"}, "prompt is not valid Unicode"),
    ({"prompt": "a", "draft": b"b"}, "draft must be a string, got bytes"),
    ({"prompt": "a", "draft": "\udfff"}, "draft is not valid Unicode"),
    ({"prompt_ids": [1, "2"]}, "prompt_ids must hold integers, got '2'"),
    ({"prompt_ids": [True]}, "prompt_ids must hold integers"),
    ({"prompt_ids": 5}, "prompt_ids must be a list"),
    ({"prompt_ids": []}, "prompt_ids is empty"),
    ({"prompt": "a", "draft_ids": [None]}, "draft_ids must hold integers"),
    ({"messages": []}, "non-empty list"),
    ({"messages": "hi"}, "non-empty list"),
    ({"messages": ["hi"]}, "a message must be"),
    ({"messages": [{"role": "user"}]}, "a message must be"),
    ({"messages": [{**USER, "name": "x"}]}, "a message must be"),
    ({"messages": [{"role": "user", "content": ""}]}, "content is empty"),
    ({"messages": [{"role": "user", "content": [1]}]}, "content must be a string"),
    ({"messages": [USER, {"role": "assistant", "content": "a"}]}, "must end with the user's turn"),
    ({"prompt": "a", "seed": 1.5}, "seed must be"),
    ({"prompt": "a", "seed": 2**63}, "seed must be"),
    ({"prompt": "a", "id": True}, "id must be"),
    ({"prompt": "a", "metadata": []}, "metadata must be"),
    ({"promt": "a", 3: 4}, r"unknown request fields \['3', 'promt'\]"),
    ("text", "must be a dict or a Request, got str"),
    ([1, 2], "must be a dict or a Request, got list"),
]


@pytest.mark.parametrize(("value", "message"), REFUSED)
def test_refused(value: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Request.parse(value)


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "a"},
        {"prompt": "a", "draft": ""},
        {"prompt_ids": (1, 2), "draft_ids": []},
        {"messages": [{"role": "assistant", "content": ""}, USER], "draft": "b", "id": "x", "metadata": {"a": None}},
        {"prompt": "a", "seed": 0, "id": 0},
        {"prompt": "a", "draft": None, "messages": None},
        MappingProxyType({"prompt": "\U0001f600"}),
    ],
)
def test_accepted(value: Any) -> None:
    request = Request.parse(value)
    assert all(getattr(request, name) == given for name, given in value.items())
    assert Request.parse(request) is request
