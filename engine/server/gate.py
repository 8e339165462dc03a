"""What every request passes first: who asks, how much, for how long, and whether anybody still waits for the answer."""

import asyncio
import hmac
from collections.abc import Awaitable, Callable

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.server.errors import ApiError
from engine.server.settings import Settings

OPEN_PATHS = ("/", "/health")
"""Answered without a token: they tell nothing about anybody's requests."""
GRACE = 10.0
"""Seconds beyond ``timeout`` in which a request may still end by itself, with an error that says where it was."""
DISCARDED = 4
"""How many times the longest body is read and dropped before the refusal, so that most clients get to read it."""


class Gate:
    """ASGI middleware. Reads the body whole, within its limits, and cancels the request when its client has gone."""

    def __init__(
        self, app: ASGIApp, settings: Settings, closing: Callable[[], bool], retry_after: Callable[[], float]
    ) -> None:
        """``closing``: whether no further POST request is to be let in; ``retry_after``: seconds after which one that is told
        to come again should."""
        self.app = app
        self.settings = settings
        self.closing = closing
        self.retry_after = retry_after
        self.in_progress = 0
        self._token = None if settings.token is None else settings.token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_caller(scope)
            body = await self._read_body(receive)
            if body is None:
                return
            self._check_room(scope)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        counted = scope["method"] == "POST"
        self.in_progress += counted
        try:
            await self._run(body, scope, receive, send)
        finally:
            self.in_progress -= counted

    async def _run(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        started = read = False

        async def replay() -> Message:
            nonlocal read
            if read:
                await asyncio.Event().wait()  # a client that leaves is watched for here, not in the endpoints
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        work = asyncio.ensure_future(_await(self.app(scope, replay, note)))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((work, gone), timeout=self.settings.timeout + GRACE, return_when=asyncio.FIRST_COMPLETED)
            late = not work.done() and not gone.done()
            if work.done():
                work.result()
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if late and not started:
            error = ApiError(504, f"not answered within {self.settings.timeout} s: ask for less", code="timeout")
            await error.response()(scope, receive, send)

    def _check_caller(self, scope: Scope) -> None:
        if _header(scope, b"content-length") and _header(scope, b"transfer-encoding"):
            # whoever forwarded it may have read another body than this server would
            raise ApiError(400, "a body has Content-Length or Transfer-Encoding, got both: send one", close=True)
        allowed = self.settings.allowed_hosts
        host = _header(scope, b"host").decode("latin-1")
        if allowed is not None and _host_name(host) not in allowed:
            raise ApiError(421, f"this server does not answer to the name {host!r:.100}: use one of {sorted(allowed)}")
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # where another application mounts this one
        if self._token is None or path in OPEN_PATHS:
            return
        kind, _, given = _header(scope, b"authorization").partition(b" ")
        if not hmac.compare_digest(given.strip(), self._token) or kind.lower() != b"bearer":
            raise ApiError(401, "this server wants its token: Authorization: Bearer ...", code="invalid_api_key")

    def _check_room(self, scope: Scope) -> None:
        if scope["method"] != "POST":
            return
        if self.closing():
            raise ApiError(503, "this server is shutting down: ask another one", code="draining")
        if self.in_progress >= self.settings.max_in_progress:
            raise ApiError(
                429, f"{self.in_progress} requests are in progress, as many as are allowed: try again",
                code="too_many_requests", retry_after=self.retry_after(),
            )  # fmt: skip

    async def _read_body(self, receive: Receive) -> bytes | None:
        """None: the client has gone."""
        try:
            with anyio.fail_after(self.settings.body_timeout):
                return await self._collect(receive)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self.settings.body_timeout} s") from None

    async def _collect(self, receive: Receive) -> bytes | None:
        limit = self.settings.max_body_bytes
        chunks: list[bytes] = []
        size, more = 0, True
        while more and size <= DISCARDED * limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            size += len(chunk)
            if size <= limit:
                chunks.append(chunk)
            more = message.get("more_body", False)
        if size > limit:
            raise ApiError(413, f"the body has more than {limit} bytes: send less", code="body_too_large")
        return b"".join(chunks)


async def _await(answer: Awaitable[None]) -> None:
    await answer


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _header(scope: Scope, name: bytes) -> bytes:
    """The header's value; of several the first, and nothing where there is none."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    return next((value for key, value in headers if key == name), b"")


def _host_name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
