"""Arbitrary requests, from the server's own OpenAPI document and from none: never a fault, never a page lost.

``FUZZ_EXAMPLES=2000 pytest tests/engine/server/test_fuzz.py`` looks for longer, at other examples each time.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st

from engine import AsyncRefiner, RefineOptions
from engine.errors import InvalidRequest
from engine.server import Settings, create_app
from engine.server.chat_body import PASSED_ON, REFUSED, USED, ChatBody
from engine.server.errors import ApiError
from engine.server.json_body import parse_object
from engine.server.openapi import document
from engine.server.options_body import FIELDS
from engine.server.refine import ONE, SHARED, RefineBody
from tests.engine.server.conftest import REGISTRY
from tests.engine.server.servers import MODEL, Base, idle, running, wait_until

TOKEN = {"Authorization": "Bearer s3cret"}
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
SETTINGS = Settings(base_url="http://127.0.0.1:1/v1", options=RefineOptions(max_new_tokens=8), max_new_tokens=32)


def looks(few: int) -> Any:
    return hypothesis.settings(
        max_examples=EXAMPLES or few, derandomize=not EXAMPLES, deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip


PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
LIKELY = st.sampled_from([
    MODEL, "egg", "", "user", "\ud800", 0, 1, 8, -1, 2**63, 10**40, 1.5, 1e308, True, False, [], {}, [1, 2], [-1],
    [True], ["x"],
    [[]], [{"role": "user", "content": "egg"}], [{"role": "user"}],
    [{"role": "user", "content": [{"type": "text", "text": "egg"}]}],
    {"steps": 1}, {"window": "auto"}, {"include_usage": True}, {"condition": True, "max_new_tokens": 3}, {"type": "text"},
])  # fmt: skip


def bodies(names: tuple[str, ...], valid: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects of known and unknown fields, many of them near a valid one."""
    fields = st.dictionaries(st.sampled_from([*names, "surprise"]), LIKELY | JSON, max_size=4)
    return fields | fields.map(lambda given: {**valid, **given})


CHATS = bodies(
    (*USED, *PASSED_ON, *REFUSED), {"model": MODEL, "messages": [{"role": "user", "content": "egg"}]}
)  # fmt: skip
REFINEMENTS = bodies((*ONE, *SHARED, *FIELDS, "requests", "draft_model"), {"prompt": "egg", "draft": "an egg"})


def check_refusal(error: ApiError) -> None:
    assert error.status in (400, 404)
    assert len(str(error)) < 1500
    assert json.loads(json.dumps(error.body))["error"]["message"] == str(error)


@looks(300)
@hypothesis.given(CHATS)
def test_chat_bodies(body: dict[str, Any]) -> None:
    try:
        chat = ChatBody.parse(parse_object(json.dumps(body).encode()), SETTINGS)
    except ApiError as error:
        check_refusal(error)
    else:
        assert chat.model == body["model"]
        assert 1 <= chat.options.max_new_tokens <= SETTINGS.max_new_tokens
        assert chat.messages[-1]["role"] == "user"
        assert chat.messages[-1]["content"]
        assert set(chat.base_body) <= set(body)
        assert not {*REFUSED, "refine", "stream"} & set(chat.base_body)


@looks(300)
@hypothesis.given(REFINEMENTS)
def test_refine_bodies(body: dict[str, Any]) -> None:
    try:
        refinement = RefineBody.parse(parse_object(json.dumps(body).encode()), SETTINGS)
    except ApiError as error:
        check_refusal(error)
    else:
        assert 1 <= len(refinement.requests) <= SETTINGS.max_list
        assert 0 <= refinement.timeout <= SETTINGS.timeout
        assert refinement.options.max_new_tokens <= SETTINGS.max_new_tokens
        assert not (refinement.stream and refinement.listed)


@looks(200)
@hypothesis.given(
    st.binary(max_size=40) | st.text(alphabet='{}[]",:0123456789eE.-\\untfalsr ', max_size=40).map(str.encode)
)
def test_any_bytes(content: bytes) -> None:
    try:
        value = parse_object(content)
    except ApiError as error:
        check_refusal(error)
    else:
        assert value == json.loads(content)


@looks(50)
@hypothesis.given(REFINEMENTS)
def test_what_the_parser_lets_through_is_encoded_or_refused(shared_refiner: AsyncRefiner, body: dict[str, Any]) -> None:
    try:
        refinement = RefineBody.parse(parse_object(json.dumps(body).encode()), SETTINGS)
    except ApiError:
        return
    for request in refinement.requests:
        try:
            prompt_ids, _ = shared_refiner.encode(request, refinement.options)
        except InvalidRequest:
            continue
        assert prompt_ids


@pytest.fixture(scope="module")
def api(shared_refiner: AsyncRefiner) -> Iterator[Any]:
    """The document as schemathesis reads it, of a server with a base API behind it."""
    with ExitStack() as stack:
        base = stack.enter_context(running(Base(text="an egg", pieces=3).app()))
        settings = Settings(
            base_url=f"{base}/v1", options=RefineOptions(max_new_tokens=8), max_new_tokens=32, timeout=20,
            max_body_bytes=65536, token="s3cret",
        )  # fmt: skip
        url = stack.enter_context(running(create_app(shared_refiner, settings, registry=REGISTRY)))
        yield schemathesis.openapi.from_url(f"{url}/openapi.json", headers=TOKEN)


def make_answerable(body: object, valid: bool) -> None:
    """What a schema cannot say: that a time may be too short, which is no server error, and that chats end with a question."""
    if not isinstance(body, dict):
        return
    if isinstance(body.get("timeout"), int | float) and 0 <= body["timeout"] < 10:
        del body["timeout"]
    if valid and body.get("messages"):
        body["messages"][-1] = {"role": "user", "content": body["messages"][-1]["content"] or "egg"}


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
@pytest.mark.parametrize(
    "operation",
    [(path, method) for path, methods in document(SETTINGS, metrics=True)["paths"].items() for method in methods],
    ids=" ".join,
)
def test_the_server_does_what_its_document_says(
    operation: tuple[str, str], mode: Any, api: Any, shared_refiner: AsyncRefiner
) -> None:
    """Statuses, types and shapes of every answer; what the document forbids is refused; afterwards all pages are free."""
    path, method = operation
    cases = api[path][method].as_strategy(generation_mode=mode)
    seen: Counter[int] = Counter()

    @looks(25)
    @hypothesis.given(cases)
    def check(case: Any) -> None:
        make_answerable(case.body, mode is schemathesis.GenerationMode.POSITIVE)
        response = case.call_and_validate(
            headers=TOKEN, timeout=30, excluded_checks=[schemathesis.checks.positive_data_acceptance]
        )
        seen[response.status_code] += 1

    try:
        check()
    except hypothesis.errors.Unsatisfiable:
        assert mode is schemathesis.GenerationMode.NEGATIVE  # a path without parameters has no wrong ones
    if mode is schemathesis.GenerationMode.POSITIVE:
        assert 4 * seen[200] >= sum(seen.values()), seen  # otherwise the document would say little about valid requests
    else:
        assert not seen[500]
    wait_until(lambda: idle(shared_refiner))
    shared_refiner._refiner.check_integrity()


@pytest.mark.parametrize("settings", [Settings(), SETTINGS, Settings(token="x", model_name="y")])
def test_the_document_names_what_the_parser_knows(settings: Settings) -> None:
    schemas = document(settings, metrics=False)["components"]["schemas"]
    assert set(schemas["Options"]["properties"]) == FIELDS
    assert set(schemas["Chat"]["properties"]) <= {*USED, *PASSED_ON, *REFUSED}
    fields = {name for kind in schemas["Refinement"]["anyOf"] for name in kind["properties"]}
    assert fields == {*ONE, *SHARED, "draft_model"}
    assert set(schemas["Refinements"]["properties"]) == {*SHARED, "requests"}
