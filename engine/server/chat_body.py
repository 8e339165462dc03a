"""The body of a chat completion: which of OpenAI's fields mean what here.

Every field is one of three: used here; passed on to the base API as it is, because it shapes nothing but the draft; or
refused unless it has the value that asks for nothing. A field that is in none of the lists is refused.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from engine.options import RefineOptions
from engine.server.errors import ApiError, bad_request
from engine.server.json_body import check_known, describe, read_flag
from engine.server.options_body import check_limit, read_options
from engine.server.settings import Settings

LIMITS = ("max_completion_tokens", "max_tokens")
USED = ("model", "messages", "stream", "stream_options", "refine", *LIMITS)
PASSED_ON = (
    "frequency_penalty", "logit_bias", "metadata", "presence_penalty", "prompt_cache_key", "reasoning_effort",
    "safety_identifier", "seed", "service_tier", "store", "temperature", "top_p", "user", "verbosity",
)  # fmt: skip
REFUSED: dict[str, tuple[object, ...]] = {
    "audio": (), "function_call": ("none",), "functions": ([],), "logprobs": (False,), "modalities": (["text"],), "n": (1,),
    "parallel_tool_calls": (True, False), "prediction": (), "response_format": ({"type": "text"},), "stop": ([],),
    "tool_choice": ("none", "auto"), "tools": ([],), "top_logprobs": (0,), "web_search_options": (),
}  # fmt: skip
"""With the values, beside null, that ask for nothing."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Of a message, and what it is in the refiner's template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatBody:
    """A chat completion that was asked for."""

    model: str
    messages: list[dict[str, str]]
    """For the refiner: text alone."""
    options: RefineOptions
    stream: bool
    include_usage: bool
    base_body: dict[str, Any]
    """What the base API is asked, but for ``stream``."""

    @classmethod
    def parse(cls, body: dict[str, Any], settings: Settings) -> "ChatBody":
        """Raises ApiError."""
        check_known(body, {*USED, *PASSED_ON, *REFUSED}, "a chat completion")
        for name, harmless in REFUSED.items():
            value = body.get(name)
            if value is not None and not any(_same(value, allowed) for allowed in harmless):
                raise bad_request(f"{name} is not supported here: leave it out, got {describe(value)}", name)
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise bad_request(f"model must be a name, got {describe(model)}", "model")
        check_model(model, settings)
        options, limit = _read_options(body, settings)
        stream = read_flag(body, "stream")
        wanted = _read_stream_options(body.get("stream_options"))
        base_body = {name: body[name] for name in ("model", "messages", *PASSED_ON) if body.get(name) is not None}
        messages = read_messages(body.get("messages"))
        return cls(
            model=model, messages=messages, options=options, stream=stream, include_usage=wanted, base_body=base_body | limit
        )  # fmt: skip


def check_model(model: str, settings: Settings) -> None:
    """Raises ApiError unless a model of this name may be asked for."""
    only = settings.base_model if settings.base_url else settings.model_name
    if only is not None and model != only:
        raise ApiError(
            404, f"no model {model!r:.100} here: {only!r} is the only one", code="model_not_found", param="model"
        )


def read_messages(value: object) -> list[dict[str, str]]:
    """The chat as the refiner takes it. Raises ApiError."""
    if not isinstance(value, list) or not value:
        raise bad_request(f"messages must be a list of one or more, got {describe(value)}", "messages")
    messages = [_read_message(message, f"messages[{i}]") for i, message in enumerate(value)]
    if messages[-1]["role"] != "user":
        raise bad_request("messages must end with the user's turn: an answer is asked for", "messages")
    return messages


def _read_message(message: object, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise bad_request(f"{where} must be an object, got {describe(message)}", where)
    check_known(message, {"role", "content", "name"}, where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise bad_request(f"{where}.role must be one of {sorted(ROLES)}, got {describe(role)}", where)
    if not isinstance(message.get("name"), str | None):
        raise bad_request(f"{where}.name must be a string, got {describe(message['name'])}", where)
    if isinstance(content, list):
        content = "".join(_read_part(part, where) for part in content)
    if not isinstance(content, str) or (role == "user" and not content):
        raise bad_request(f"{where}.content must be text, or parts of type text, got {describe(content)}", where)
    return {"role": ROLES[role], "content": content}


def _read_part(part: object, where: str) -> str:
    if (
        isinstance(part, dict)
        and set(part) == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    ):
        return part["text"]
    raise bad_request(f'{where}.content must have parts {{"type": "text", "text": ...}} only', where)


def _read_options(body: dict[str, Any], settings: Settings) -> tuple[RefineOptions, dict[str, int]]:
    """Options of the refinement, of whose limits the smallest holds, and the limits under the names that the client chose."""
    options = read_options(body.get("refine"), settings, "refine")
    given = [name for name in LIMITS if body.get(name) is not None]
    limits = {name: check_limit(name, body[name], settings) for name in given}
    if (body.get("refine") or {}).get("max_new_tokens") is None and limits:
        options = dataclasses.replace(options, max_new_tokens=settings.max_new_tokens)
    return dataclasses.replace(options, max_new_tokens=min([options.max_new_tokens, *limits.values()])), limits


def _read_stream_options(value: object) -> bool:
    """Whether the usage is to be streamed too, if anything is."""
    if value is None:
        return False
    if not isinstance(value, dict):
        raise bad_request(f"stream_options must be an object, got {describe(value)}", "stream_options")
    check_known(value, {"include_usage", "include_obfuscation"}, "stream_options")
    read_flag(value, "include_obfuscation")
    return read_flag(value, "include_usage")


def _same(value: object, allowed: object) -> bool:
    return type(value) is type(allowed) and value == allowed
