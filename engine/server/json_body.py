"""JSON bodies, read strictly: what comes from clients is an object, without NaN and within sane depth."""

import json
import math
from collections.abc import Collection
from typing import Any

from starlette.requests import Request as HttpRequest

from engine.server.errors import ApiError, bad_request

DEEPEST = 100


async def read_object(request: HttpRequest) -> dict[str, Any]:
    """The body's JSON object. Raises ApiError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a form's types are sent by web pages without asking this server first
        raise ApiError(415, f"the body must be JSON, with Content-Type: application/json, got {kind!r:.100}")
    return parse_object(await request.body())


def parse_object(text: bytes) -> dict[str, Any]:
    """A JSON object. Raises ApiError."""
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON: {type(error).__name__}: {error!s:.200}") from None
    if not isinstance(value, dict):
        raise bad_request(f"the body must be a JSON object, got {describe(value)}")
    _check_depth(value)
    return value


def check_known(value: dict[str, Any], known: Collection[str], where: str) -> None:
    """Raises ApiError if there is a field that nobody would read."""
    unknown = sorted(name for name in value if name not in known)
    if unknown:
        raise bad_request(
            f"unknown fields {unknown!s:.200} in {where}; known are {sorted(known)}", f"{unknown[0]:.100}"
        )


def read_flag(value: dict[str, Any], name: str) -> bool:
    """A field that is true, false or, like null, not there. Raises ApiError."""
    flag = value.get(name)
    if flag is not None and not isinstance(flag, bool):
        raise bad_request(f"{name} must be true or false, got {describe(flag)}", name)
    return bool(flag)


def describe(value: object) -> str:
    """What was got, in a few words whatever its size and depth."""
    if value is None or isinstance(value, bool | int | float):
        return f"{json.dumps(value):.80}"
    return "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else "a string"


def dump(value: object) -> bytes:
    """JSON in ASCII: also lone surrogates, which are valid JSON and not valid UTF-8, survive."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text:.40} is too large a number")
    return value


def _check_depth(value: object) -> None:
    """What was parsed in C must still be written, here and by others, within their limits of recursion."""
    level: list[Any] = [value]
    depth = 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise bad_request(f"the body is nested deeper than {DEEPEST} levels")
        members = (member for part in level for member in (part.values() if isinstance(part, dict) else part))
        level = [member for member in members if isinstance(member, dict | list)]
