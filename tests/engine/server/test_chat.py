"""Chat completions, asked for with OpenAI's own client."""

import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest

from engine import DEFAULT_CONDITION, AsyncRefiner, RefineOptions, Refiner, Result
from tests.engine.server.servers import MODEL, PATIENCE, Base, wait_until

QUESTION: list[Any] = [{"role": "user", "content": "How do I boil an egg?"}]
LONG = " ".join(f"Then take egg number {i} and boil it it in cold water." for i in range(12))


def client(url: str, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key=more.pop("api_key", "none"), max_retries=0, timeout=PATIENCE, **more
    )


@pytest.fixture(scope="module")
def expected() -> Callable[..., Result]:
    """The synchronous engine's answer to QUESTION and a draft."""
    engine = Refiner.from_pretrained(kv_cache_tokens=4096)

    def refine(draft: str | None, **options: Any) -> Result:
        request = {"messages": QUESTION} | ({} if draft is None else {"draft": draft})
        return engine.refine([request], RefineOptions(**{"max_new_tokens": 40, **options}))[0]

    return refine


OPTIONS: list[dict[str, Any]] = [
    {},
    {"condition": DEFAULT_CONDITION},
    {"steps": 1, "block_size": 16, "max_new_tokens": 120},
    {"steps": 3, "block_size": 32, "keep_prefix": 40, "max_new_tokens": 100},
    {"temperature": 0.8, "seed": 5, "max_new_tokens": 24},
    {"keep_prefix": 55, "max_new_tokens": 60},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "default")
def test_both_forms_give_what_the_engine_gives(
    options: dict[str, Any], start: Callable[..., str], base: Base, expected: Callable[..., Result]
) -> None:
    """However the draft arrives: also in blocks of ten tokens, which its tokens and characters straddle."""
    api = client(start(options=RefineOptions(**{"max_new_tokens": 40, **options}), stream_block=10))
    for text in (Base.text, LONG, "", "Wasser — 8 Min. 🥚" * 9, "egg" * 60):
        base.text, base.pieces = text, 7
        check_both_forms(api, expected(text, **options), options.get("max_new_tokens", 40))


def check_both_forms(api: openai.OpenAI, wanted: Result, limit: int) -> None:
    whole = api.chat.completions.create(model=MODEL, messages=QUESTION)
    choice = whole.choices[0]
    assert choice.message.content == wanted.text
    reason = "length" if wanted.finish_reason == "length" or len(wanted.token_ids) == limit else "stop"
    assert choice.finish_reason == reason
    assert whole.usage is not None
    assert whole.usage.completion_tokens == len(wanted.token_ids)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.model_dump()["refine"]["converged"] == wanted.converged
    asked: Any = {"model": MODEL, "messages": QUESTION, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(api.chat.completions.create(**asked))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == reason
    assert all(c.choices[0].finish_reason is None for c in chunks[:-2])
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage
    assert not chunks[-1].choices


def test_blocks_are_refined_while_the_draft_arrives(start: Callable[..., str], base: Base) -> None:
    """The base API says no more before the client has the first blocks of the answer."""
    base.text, base.pieces, base.held_after = LONG, 4, 60
    api = client(start(options=RefineOptions(max_new_tokens=150), stream_block=16))
    chunks = iter(api.chat.completions.create(model=MODEL, messages=QUESTION, stream=True))
    text = ""
    while len(text) < 40:
        text += next(chunks).choices[0].delta.content or ""
    assert base.sent == 60
    base.release.set()
    rest = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert rest


def test_no_further_draft_is_paid_for_when_the_answer_is_complete(start: Callable[..., str], base: Base) -> None:
    base.text, base.pieces, base.held_after = LONG, 4, 60
    api = client(start(options=RefineOptions(max_new_tokens=30), stream_block=16))
    whole = api.chat.completions.create(model=MODEL, messages=QUESTION)
    assert whole.choices[0].finish_reason == "length"
    assert whole.model_dump()["refine"]["base_finish_reason"] is None
    wait_until(lambda: base.left_early == 1)


def test_the_engine_is_a_base_api_itself(
    start: Callable[..., str], expected: Callable[..., Result], refiner: AsyncRefiner
) -> None:
    """Two servers, one behind the other: what the first one answers alone is the draft of the second."""
    behind = start(base_url=None, model_name="alone")
    front = start(base_url=f"{behind}/v1", options=RefineOptions(max_new_tokens=40, condition=DEFAULT_CONDITION))
    alone = client(behind).chat.completions.create(model="alone", messages=QUESTION)
    assert alone.choices[0].message.content == expected(None).text
    both = client(front).chat.completions.create(model="alone", messages=QUESTION)
    assert both.choices[0].message.content == expected(expected(None).text, condition=DEFAULT_CONDITION).text
    assert both.model_dump()["refine"]["base_usage"] == alone.usage.model_dump(exclude_none=True)  # type: ignore[union-attr]
    assert [model.id for model in client(front).models.list()] == ["alone"]


def test_what_the_base_api_is_asked(start: Callable[..., str], base: Base) -> None:
    api = client(start(base_key="secret"))
    messages: list[Any] = [
        {"role": "developer", "content": "Be short."},
        {
            "role": "user",
            "name": "Ann",
            "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "do I?"}],
        },
    ]
    api.chat.completions.create(
        model=MODEL, messages=messages, temperature=0.3, seed=7, max_completion_tokens=9, n=1, tools=[], stop=None,
        logit_bias={"5": 1}, user="Ann", extra_body={"refine": {"window": 4}},
    )  # fmt: skip
    assert base.bodies == [
        {
            "model": MODEL, "messages": messages, "temperature": 0.3, "seed": 7, "max_completion_tokens": 9,
            "logit_bias": {"5": 1}, "user": "Ann", "stream": True, "stream_options": {"include_usage": True},
        }
    ]  # fmt: skip
    assert base.headers[0]["authorization"] == "Bearer secret"


def test_the_smallest_limit_holds(start: Callable[..., str], base: Base) -> None:
    api = client(start())
    for limits, tokens in (
        ({"max_tokens": 9, "max_completion_tokens": 7}, 7), ({"max_tokens": 9, "refine": {"max_new_tokens": 5}}, 5),
        ({"max_tokens": 50}, 50), ({"refine": {"max_new_tokens": 45}}, 45), ({}, 40),
    ):  # fmt: skip
        answer = api.chat.completions.create(model=MODEL, messages=QUESTION, extra_body=limits)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == tokens


def test_no_usage_is_asked_for_where_that_is_refused(start: Callable[..., str], base: Base) -> None:
    client(start(base_usage=False)).chat.completions.create(model=MODEL, messages=QUESTION)
    assert "stream_options" not in base.bodies[0]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 2}, "n"), ({"tools": [{"type": "function"}]}, "tools"), ({"stop": ["\n"]}, "stop"),
    ({"logprobs": True}, "logprobs"),
    ({"response_format": {"type": "json_object"}}, "response_format"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 5000}, "max_tokens"), ({"max_completion_tokens": True}, "max_completion_tokens"),
    ({"surprise": 1}, "surprise"), ({"refine": {"steps": 0}}, "refine"),
    ({"refine": {"condition": "{prompt}"}}, "condition"),
    ({"refine": {"max_new_tokens": 5000}}, "refine"), ({"refine": 5}, "refine"), ({"stream": "yes"}, "stream"),
    ({"messages": []}, "messages"), ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"), ({"model": ""}, "model"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
    ({"stream_options": 5}, "stream_options"),
]  # fmt: skip


def test_what_cannot_be_honoured_is_refused(start: Callable[..., str], base: Base) -> None:
    api = client(start())
    for fields, param in REFUSED:
        body: dict[str, Any] = {"model": MODEL, "messages": QUESTION, **fields}
        with pytest.raises(openai.BadRequestError) as refused:
            api.post("/chat/completions", cast_to=object, body=body)
        assert refused.value.param == param
        assert refused.value.type == "invalid_request_error"
    assert base.bodies == []  # before anybody has worked for it


def test_a_prompt_that_does_not_fit_is_told_before_a_draft_is_paid_for(start: Callable[..., str], base: Base) -> None:
    api = client(start())
    with pytest.raises(openai.BadRequestError, match="positions"):
        api.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "egg " * 3000}])
    assert base.bodies == []


def test_only_the_one_model(start: Callable[..., str]) -> None:
    api = client(start(base_model="writer"))
    assert [model.id for model in api.models.list()] == ["writer"]
    with pytest.raises(openai.NotFoundError) as refused:
        api.chat.completions.create(model="other", messages=QUESTION)
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize("fault", [None, "refusal"])
def test_a_filtered_draft_is_not_answered_by_the_refiner(
    fault: str | None, start: Callable[..., str], base: Base
) -> None:
    base.text, base.finish, base.fault = "", "content_filter", fault
    api = client(start())
    whole = api.chat.completions.create(model=MODEL, messages=QUESTION)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("", "content_filter")
    *_, last = api.chat.completions.create(model=MODEL, messages=QUESTION, stream=True)
    assert last.choices[0].finish_reason == "content_filter"


def test_many_at_once(start: Callable[..., str], base: Base) -> None:
    """Answers go to those who asked."""
    url = start(stream_block=8)
    api = client(url)
    prompts = [f"What is {i} times three?" for i in range(12)]
    with Refiner.from_pretrained(kv_cache_tokens=4096) as engine:
        wanted = [
            r.text
            for r in engine.refine(
                [{"prompt": p, "draft": base.text} for p in prompts], RefineOptions(max_new_tokens=40)
            )
        ]
    answers: dict[int, str] = {}

    def ask(i: int) -> None:
        messages: Any = [{"role": "user", "content": prompts[i]}]
        if i % 2:
            chunks = api.chat.completions.create(model=MODEL, messages=messages, stream=True)
            answers[i] = "".join(c.choices[0].delta.content or "" for c in chunks)
        else:
            answers[i] = api.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content or ""

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[i] for i in range(len(prompts))] == wanted
