"""RefineOptions as clients may give them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from engine.options import DEFAULT_CONDITION, RefineOptions
from engine.server.errors import bad_request
from engine.server.json_body import check_known, describe, read_flag
from engine.server.settings import Settings

FIELDS = frozenset(field.name for field in dataclasses.fields(RefineOptions)) - {"concurrency"}
"""``condition`` is only switched on or off: a template's format fields could ask for any amount of memory."""


def read_options(value: object, settings: Settings, where: str) -> RefineOptions:
    """The server's own options, changed by those of an object that may be absent. Raises ApiError."""
    if value is None:
        return settings.options
    if not isinstance(value, dict):
        raise bad_request(f"{where} must be an object, got {describe(value)}", where)
    check_known(value, FIELDS, where)
    changes: dict[str, Any] = {name: given for name, given in value.items() if given is not None}
    if "condition" in changes:
        changes["condition"] = (
            (settings.options.condition or DEFAULT_CONDITION) if read_flag(value, "condition") else None
        )
    if "steps" in value:  # null, too, says something: until convergence
        changes["steps"] = value["steps"]
    return limited(changes, settings, where)


def limited(changes: Mapping[str, Any], settings: Settings, where: str) -> RefineOptions:
    """The server's own options with changes, none of which exceeds its limits. Raises ApiError."""
    try:
        options = dataclasses.replace(settings.options, **changes)
    except ValueError as error:
        raise bad_request(f"{where}: {error}", where) from None
    if options.max_new_tokens > settings.max_new_tokens:
        raise bad_request(
            f"{where}: max_new_tokens {options.max_new_tokens} exceeds this server's limit of {settings.max_new_tokens}",
            where,
        )
    return options


def check_limit(name: str, value: object, settings: Settings) -> int:
    """A longest answer under one of OpenAI's names. Raises ApiError."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= settings.max_new_tokens:
        raise bad_request(
            f"{name} must be an integer in 1 .. {settings.max_new_tokens}, this server's limit, got {describe(value)}",
            name,
        )
    return value
