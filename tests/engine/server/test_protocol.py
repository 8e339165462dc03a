"""What arrives before there is a request: heads that are slow, without end, or ambiguous."""

import socket
import time
from collections.abc import Iterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from engine.server import protocol
from tests.engine.server.servers import running


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of an application that answers with the bodies it gets."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.5)

    async def echo(request: Request) -> PlainTextResponse:
        return PlainTextResponse(b"got " + await request.body())

    app = Starlette(routes=[Route("/", echo, methods=["GET", "POST"])])
    with running(app, http=protocol.Protocol) as url:
        yield int(url.rsplit(":", 1)[1])


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def read(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


BEGUN = b"GET / HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize(("before", "begun"), [(b"", b""), (b"", BEGUN), (BEGUN + b"\r\n", BEGUN)])
def test_a_head_that_does_not_end_is_cut_off(before: bytes, begun: bytes, port: int) -> None:
    """Also if a byte comes now and then, and on a connection that has been used."""
    with connect(port) as connection:
        connection.sendall(before)
        answer = b""
        while before and not answer.endswith(b"got "):
            answer += connection.recv(4096)
        connection.sendall(begun)
        connection.settimeout(0.1)
        assert closed(connection, drip=b"x" if begun else b"")


def closed(connection: socket.socket, drip: bytes) -> bool:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            connection.sendall(drip)
            return connection.recv(4096) == b""
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


def test_a_head_without_end_is_not_kept(port: int) -> None:
    megabytes = b"a" * (64 << 20)
    with connect(port) as connection, pytest.raises(ConnectionError):
        connection.sendall(megabytes)


def test_a_slow_body_is_not_a_slow_head(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 3\r\n\r\n")
        for byte in b"abc":
            time.sleep(0.3)
            connection.sendall(bytes([byte]))
        assert read(connection).endswith(b"got abc")


AMBIGUOUS = {
    "two lengths": b"Content-Length: 3\r\nContent-Length: 4",
    "length with a sign": b"Content-Length: +3",
    "an unknown coding": b"Transfer-Encoding: xchunked",
    "two codings": b"Transfer-Encoding: chunked, chunked",
    "a space before the colon": b"Content-Length : 3",
    "two hosts": b"Host: b",
    "a control character": b"X: a\x00b",
}


@pytest.mark.parametrize("line", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_two_servers_could_read_differently_is_refused(line: bytes, port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\n" + line + b"\r\n\r\nabcGET / HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = read(connection)
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 "))
    assert answer.count(b"HTTP/1.1 ") == 1
