"""Server-sent events: written to clients, read from the base API."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.errors import EngineError
from engine.server.errors import ApiError, api_error
from engine.server.json_body import dump


def event(value: object, name: str | None = None) -> bytes:
    """One event with JSON data."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + dump(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends events as they come. Its source is closed in any case, also when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], tell: Callable[[ApiError], bytes]) -> None:
        """``first``: drawn from the source already, so that its early errors had a status of their own; ``tell``: the event
        that a late error becomes."""
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._rest, self._tell = first, rest, tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            try:
                async for data in self._rest:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except (ApiError, EngineError) as error:
                told = self._tell(error if isinstance(error, ApiError) else api_error(error))
                await send({"type": "http.response.body", "body": told, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def stream(source: AsyncGenerator[bytes, None], tell: Callable[[ApiError], bytes]) -> EventStream:
    """The response whose events ``source`` yields; raises what fails before the first one."""
    return EventStream(await anext(source), source, tell)


async def read_events(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The data of each event in a body, whose lines may end in LF or CRLF; other fields and comments are passed over."""
    rest, data = b"", list[bytes]()
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data)
                data = []
    if rest.startswith(b"data:"):  # a last line without its end
        data.append(rest[5:].strip())
    if data:
        yield b"\n".join(data)
