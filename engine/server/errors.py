"""Errors as HTTP tells them: a status and OpenAI's error object."""

import logging
import math
from typing import Any

from starlette.responses import JSONResponse

from engine.errors import (
    DeadlineExceeded,
    EngineDead,
    EngineError,
    InvalidRequest,
    NonFiniteLogits,
    OutOfMemory,
    QueueFull,
)

logger = logging.getLogger("engine.server")

_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
    408: "timeout_error", 413: "invalid_request_error", 415: "invalid_request_error", 421: "invalid_request_error",
    429: "rate_limit_error", 500: "server_error", 502: "upstream_error", 503: "server_error", 504: "timeout_error",
}  # fmt: skip
STATUSES = tuple(_KINDS)


class ApiError(Exception):
    """An answer that is an error. ``retry_after``: seconds; ``code``: a word for programs; ``close``: whether the connection
    must not be used again."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        retry_after: float | None = None, close: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after, self.close = status, code, param, retry_after, close

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}"""
        kind = _KINDS.get(self.status, "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(math.ceil(self.retry_after))  # the header has whole seconds only
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.close:
            headers["Connection"] = "close"
        return headers

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is wrong as it is."""
    return ApiError(400, message, param=param, code=code)


def api_error(error: EngineError) -> ApiError:
    """What an error of the engine is to a client. What quotes a library's own words, which may name files and sizes of this
    machine, is logged for its operator and told without them."""
    text, code = str(error), type(error).__name__
    if isinstance(error, InvalidRequest):
        return bad_request(text, code=code)
    if isinstance(error, QueueFull):
        return ApiError(429, text, code=code, retry_after=error.retry_after)
    if isinstance(error, DeadlineExceeded):
        return ApiError(504, text, code=code)
    if isinstance(error, NonFiniteLogits):
        return ApiError(500, text, code=code)
    if isinstance(error, EngineDead):  # which has been logged when it died
        return ApiError(503, "the engine does not run any more: ask another server", code=code)
    logger.error("a request failed", exc_info=error)
    if isinstance(error, OutOfMemory):
        return ApiError(
            503, "too little memory for this request: ask for less, or again later", code=code, retry_after=1.0
        )
    return ApiError(500, "the engine failed on this request; its log says why", code=code)
