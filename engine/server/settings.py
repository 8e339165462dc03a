"""What a server may do, and for whom."""

import math
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from engine.options import RefineOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of ``create_app``. Keys and tokens are left out of its repr."""

    options: RefineOptions = field(default_factory=RefineOptions)
    """How answers are refined where a request does not say otherwise."""
    model_name: str = "refiner"
    """The refiner's name in /v1/models, and in chat completions of a server without a base API."""
    base_url: str | None = None
    """OpenAI-compatible API that writes the drafts of chat completions, such as http://127.0.0.1:8000/v1. None: no drafts,
    the refiner answers alone."""
    base_model: str | None = None
    """The base API's only model that may be asked for. None: any."""
    base_key: str | None = field(default=None, repr=False)
    """Bearer token for the base API."""
    base_usage: bool = True
    """Ask the base API for its token counts (``stream_options``, which some servers do not know)."""
    base_timeout: float = 60.0
    """Seconds for which the base API may say nothing."""
    max_draft_bytes: int = 1 << 20
    """Longest draft taken from the base API."""
    token: str | None = field(default=None, repr=False)
    """Bearer token that clients must bring. None: none."""
    allowed_hosts: frozenset[str] | None = None
    """Names in the Host header that are answered, without port. None: all. A server on the loopback interface without a
    token should answer to loopback names alone: any web page can make a browser ask it under the page's own name."""
    max_body_bytes: int = 1 << 20
    """Longest body of a request."""
    body_timeout: float = 30.0
    """Seconds in which a body must arrive."""
    max_new_tokens: int = 1024
    """Longest answer that a request may ask for."""
    max_in_progress: int = 256
    """POST requests worked on at once; more are told to come again."""
    max_list: int = 64
    """Requests in the body of one /v1/refine."""
    timeout: float = 300.0
    """Seconds that a request may take, its draft included."""
    stream_block: int = 64
    """Answer tokens refined together while the draft still arrives; with ``steps`` it is options.block_size."""

    def __post_init__(self) -> None:
        for name in (
            "max_draft_bytes", "max_body_bytes", "max_new_tokens", "max_in_progress", "max_list", "stream_block"
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        for name in ("base_timeout", "body_timeout", "timeout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number of seconds above 0, got {value!r}")
        if self.options.max_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"options.max_new_tokens is {self.options.max_new_tokens}, above the limit max_new_tokens"
                f" {self.max_new_tokens}: raise the limit or lower the default"
            )
        for name in ("token", "base_key"):
            secret = getattr(self, name)
            if secret is not None and (not secret or not secret.isascii() or not secret.isprintable() or " " in secret):
                raise ValueError(f"{name} must be printable ASCII without spaces, and not empty")
        if self.base_url is not None:
            check_url(self.base_url)


def check_url(url: str) -> None:
    """Raises ValueError unless ``url`` is where an API may be."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"the base API's URL must be one such as http://127.0.0.1:8000/v1, got {url!r}")
    if parts.username or parts.password:
        raise ValueError("the base API's URL must not hold a user name or password: give the key apart from it")
