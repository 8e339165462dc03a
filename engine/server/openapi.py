"""The server's OpenAPI document."""

import dataclasses
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from engine.server.chat_body import PASSED_ON, ROLES
from engine.server.settings import Settings

Schema = dict[str, Any]

_ERRORS = {
    400: "The request is wrong as it is; the message says how.",
    401: "No token, or a wrong one.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    421: "The Host header names a server that this one is not.",
    429: "Too many wait here, or at the base API: come again after Retry-After seconds.",
    502: "The base API failed.",
    503: "The engine is dead, or shutting down.",
    504: "Not ready in time, here or at the base API.",
}
_ALWAYS = (401, 421)
_POSTED = (400, 408, 413, 415, 429, 502, 503, 504)


def document(settings: Settings, *, metrics: bool) -> Schema:
    """OpenAPI 3.1, with this server's own limits."""
    paths: Schema = {
        "/": {"get": _operation("page", "A page to try the refiner on", {200: _content("text/html", {"type": "string"})})},
        "/health": {"get": _operation("health", "Whether requests are taken", _health())},
        "/openapi.json": {"get": _operation("openapi", "This document", _answers(200, {"type": "object"}))},
        "/v1/models": {
            "get": _operation("models", "Names for `model`", _answers(200, _ref("Models"), (429, 502, 504)))
        },
        "/v1/chat/completions": {"post": _chat()},
        "/v1/refine": {"post": _refine(settings)},
    }  # fmt: skip
    if metrics:
        answers = {**_errors(_ALWAYS), 200: _content("text/plain", {"type": "string"})}
        paths["/metrics"] = {"get": _operation("metrics", "Figures for Prometheus", answers)}
    components: Schema = {"schemas": _schemas(settings)}
    top: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "diffpo-engine",
            "version": _version(),
            "summary": "Draft answers, refined in parallel steps",
        },
        "paths": paths,
        "components": components,
    }
    if settings.token is not None:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        top["security"] = [{"token": []}]
        for path in ("/", "/health"):
            paths[path]["get"]["security"] = []
    return top


def _version() -> str:
    try:
        return version("diffpo-engine")
    except PackageNotFoundError:
        return "unknown"


def _chat() -> Schema:
    text = (
        "OpenAI's chat completion. The base API writes a draft, the refiner the answer. `refine` holds options of the"
        f" refinement; {', '.join(PASSED_ON)} go to the base API as they are; other fields of OpenAI's are refused unless"
        " they ask for nothing. `usage` counts the refiner's tokens."
    )
    operation = _operation("chat", text, _answers(200, _ref("Completion"), (404, *_POSTED), streamed=True))
    return {**operation, "requestBody": _body(_ref("Chat"))}


def _refine(settings: Settings) -> Schema:
    text = (
        "Refines a draft given here, or written by `draft_model` of the base API. With `stream` every step is an event:"
        " `draft` as it is written, `iterate` with the final and the tentative text, `result` or `error` at the end."
    )
    operation = _operation("refine", text, _answers(200, _ref("Refined"), (404, *_POSTED), streamed=True))
    return {**operation, "requestBody": _body({"oneOf": [_ref("Refinement"), _ref("Refinements")]})}


def _schemas(settings: Settings) -> Mapping[str, Schema]:
    text, whole = {"type": "string"}, {"type": "integer"}
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    given = {
        "prompt": {"type": "string", "minLength": 1}, "messages": _messages(["system", "user", "assistant"]),
        "prompt_ids": {**ids, "minItems": 1}, "draft": _maybe(text), "draft_ids": _maybe(ids),
        "id": {"type": ["string", "integer", "null"]}, "seed": _maybe(_integer(0, 2**63 - 1)),
        "metadata": {"type": ["object", "null"]},
    }  # fmt: skip
    shared = {
        "options": _maybe(_ref("Options")),
        "timeout": _maybe({"type": "number", "minimum": 0, "maximum": settings.timeout}),
    }
    result = {
        "id": {"type": ["string", "integer", "null"]}, "text": {"type": ["string", "null"]}, "token_ids": ids,
        "steps": whole, "converged": {"type": "boolean"}, "forward_tokens": whole,
        "finish_reason": {"enum": ["eos", "length", "steps"]}, "seconds": {"type": "number"}, "metadata": {"type": "object"},
        "draft": {"type": ["string", "null"]},
    }  # fmt: skip
    refined = _object(result, [name for name in result if name != "draft"])
    error = _object({"message": text, "type": text, "param": {}, "code": {}}, ["message", "type", "param", "code"])
    return {
        "Error": _object({"error": error}, ["error"]),
        "Event": _object({"event": {"enum": ["message", "draft", "iterate", "result", "error"]}, "data": text}, ["data"]),
        "Models": {"type": "object", "required": ["object", "data"]},
        "Options": _options(settings),
        "Chat": _chat_body(settings),
        "Completion": {"type": "object", "required": ["id", "object", "created", "model", "choices", "usage", "refine"]},
        "Refinement": {"anyOf": _requests(given, {**shared, "stream": {"type": ["boolean", "null"]}}, drafted=True)},
        "Refinements": _object(
            {
                "requests": {
                    "type": "array", "items": {"anyOf": _requests(given, {})}, "minItems": 1, "maxItems": settings.max_list
                },
                "stream": {"enum": [False, None]}, **shared,
            },
            ["requests"],
        ),
        "Refined": {"anyOf": [refined, _object({"results": {"type": "array", "items": {"type": "object"}}}, ["results"])]},
    }  # fmt: skip


def _requests(fields: Schema, shared: Schema, *, drafted: bool = False) -> list[Schema]:
    """Every form of a request: one kind of prompt, and at most one kind of draft."""
    kinds: list[Schema] = []
    for prompt in ("prompt", "messages", "prompt_ids"):
        drafts = (
            {"draft": fields["draft"]},
            {"draft_ids": fields["draft_ids"]},
            {"draft_model": {"type": "string", "minLength": 1}},
        )
        for draft in drafts[: 3 if drafted and prompt != "prompt_ids" else 2]:
            rest = {name: fields[name] for name in ("id", "seed", "metadata")}
            kinds.append(_object({prompt: fields[prompt], **draft, **rest, **shared}, [prompt]))
    return kinds


def _options(settings: Settings) -> Schema:
    fields = {
        "steps": _integer(1), "keep_prefix": _integer(0), "max_new_tokens": _integer(1, settings.max_new_tokens),
        "window": {"anyOf": [_integer(1), {"const": "auto"}]}, "realign": {"type": "boolean"},
        "condition": {"type": "boolean"}, "temperature": {"type": "number", "minimum": 0},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "seed": _integer(0, 2**63 - 1),
        "block_size": _integer(1),
    }  # fmt: skip
    shown = {
        field.name: getattr(settings.options, field.name) for field in dataclasses.fields(settings.options)
    } | {"condition": settings.options.condition is not None}  # fmt: skip
    return _object({name: {**_maybe(schema), "default": shown[name]} for name, schema in fields.items()})


def _chat_body(settings: Settings) -> Schema:
    only = settings.base_model if settings.base_url else settings.model_name
    limit = _maybe(_integer(1, settings.max_new_tokens))
    fields: Schema = {
        "model": {"type": "string", "minLength": 1} if only is None else {"const": only},
        "messages": _messages(sorted(ROLES)), "max_tokens": limit, "max_completion_tokens": limit,
        "stream": {"type": ["boolean", "null"]}, "refine": _maybe(_ref("Options")),
        "stream_options": _maybe(_object({"include_usage": {"type": "boolean"}, "include_obfuscation": {"type": "boolean"}})),
        "n": {"enum": [1, None]}, "stop": {"enum": [[], None]}, "tools": {"enum": [[], None]},
        "logprobs": {"enum": [False, None]}, "response_format": {"enum": [{"type": "text"}, None]},
        **{name: {} for name in PASSED_ON},
    }  # fmt: skip
    return _object(fields, ["model", "messages"])


def _messages(roles: list[str]) -> Schema:
    message = _object({"role": {"enum": roles}, "content": {"type": "string"}}, ["role", "content"])
    return {"type": "array", "items": message, "minItems": 1}


def _integer(least: int, most: int | None = None) -> Schema:
    return {"type": "integer", "minimum": least} | ({} if most is None else {"maximum": most})


def _maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(properties: Schema, required: list[str] | None = None) -> Schema:
    return {
        "type": "object", "properties": properties, "additionalProperties": False, "required": required or []
    }  # fmt: skip


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _body(schema: Schema) -> Schema:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _operation(name: str, text: str, responses: Mapping[int, Schema]) -> Schema:
    described = {
        str(status): {"description": _ERRORS.get(status, "As asked."), **answer} for status, answer in responses.items()
    }
    return {"operationId": name, "description": text, "responses": described}


def _content(kind: str, schema: Schema) -> Schema:
    return {"content": {kind: {"schema": schema}}}


def _errors(statuses: tuple[int, ...]) -> dict[int, Schema]:
    return {status: _content("application/json", _ref("Error")) for status in statuses}


def _answers(status: int, schema: Schema, errors: tuple[int, ...] = (), *, streamed: bool = False) -> dict[int, Schema]:
    answer = _content("application/json", schema)
    if streamed:
        answer["content"]["text/event-stream"] = {"schema": _ref("Event")}
    return {status: answer, **_errors((*_ALWAYS, *errors))}


def _health() -> dict[int, Schema]:
    status = _object({"status": {"enum": ["alive", "draining", "dead"]}}, ["status"])
    return {code: _content("application/json", status) for code in (200, 503)} | _errors((421,))
