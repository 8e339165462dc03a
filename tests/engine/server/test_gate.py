"""Who is let in, with how much, and for how long."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from engine import AsyncRefiner
from engine.server import Settings, create_app
from tests.engine.server.servers import MODEL, PATIENCE, Base, http, running, wait_until

REQUEST = {"prompt": "How do I boil an egg?", "draft": "In water."}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "How do I boil an egg?"}]}


def status(response: httpx.Response) -> tuple[int, str | None]:
    return response.status_code, response.json()["error"]["code"]


def test_a_token(start: Callable[..., str]) -> None:
    url, client = start(base_url=None, token="s3cret"), httpx.Client(timeout=PATIENCE)
    for headers in (
        {}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"Authorization": "Basic s3cret"},
        {"Authorization": "Bearer s3cret2"}, {"Authorization": b"Bearer \xff\xfe"},
    ):  # fmt: skip
        for method, path in (("POST", "/v1/refine"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/nothing")):
            response = client.request(method, url + path, headers=headers)
            assert status(response) == (401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
    assert http.get(f"{url}/health").status_code == http.get(f"{url}/").status_code == 200
    response = http.post(f"{url}/v1/refine", json=REQUEST, headers={"Authorization": "bearer s3cret"})
    assert response.status_code == 200


def test_mounted_in_another_application(refiner: AsyncRefiner) -> None:
    app = create_app(refiner, Settings(token="s3cret"))
    with running(Starlette(routes=[Mount("/refiner", app)])) as url, httpx.Client(timeout=PATIENCE) as client:
        assert client.get(f"{url}/refiner/health").status_code == client.get(f"{url}/refiner/").status_code == 200
        assert client.get(f"{url}/refiner/v1/models").status_code == 401
        headers = {"Authorization": "Bearer s3cret"}
        assert client.post(f"{url}/refiner/v1/refine", json=REQUEST, headers=headers).status_code == 200


def test_only_names_of_this_machine(start: Callable[..., str]) -> None:
    url = start(base_url=None, allowed_hosts=frozenset({"127.0.0.1", "::1"}))
    assert http.get(f"{url}/v1/models").status_code == 200
    assert http.get(f"{url}/v1/models", headers={"Host": "[::1]:5"}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "", "[::2]"):
        assert http.get(f"{url}/v1/models", headers={"Host": host}).status_code == 421


def test_a_web_page_cannot_post_without_asking(start: Callable[..., str]) -> None:
    """Types that browsers send to other sites unasked are refused; other types they ask for first, in vain."""
    url = start(base_url=None)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        response = http.post(f"{url}/v1/refine", content=json.dumps(REQUEST), headers={"Content-Type": kind})
        assert response.status_code == 415
    asked = http.options(f"{url}/v1/refine", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in asked.headers


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large(chunked: bool, start: Callable[..., str]) -> None:
    url = start(base_url=None, max_body_bytes=1000)
    fits = json.dumps(REQUEST).ljust(1000).encode()

    def parts(content: bytes) -> Iterator[bytes]:
        for i in range(0, len(content), 100):
            yield content[i : i + 100]

    for content, wanted in ((fits, 200), (fits + b" ", 413), (fits + b" " * 2500, 413)):
        response = http.post(
            f"{url}/v1/refine",
            content=parts(content) if chunked else content,
            headers={"Content-Type": "application/json"},
        )
        assert response.status_code == wanted


def test_a_body_that_does_not_end_is_not_kept(start: Callable[..., str]) -> None:
    """It is answered, and dropped, after a few times what is allowed."""
    url = start(base_url=None, max_body_bytes=1000)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST /v1/refine HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000000000000\r\n\r\n"
        connection.sendall(head.encode() + b" " * 4500)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_of_two_lengths(start: Callable[..., str]) -> None:
    """Whatever comes behind it is not taken for a request."""
    url = start(base_url=None)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST /v1/refine HTTP/1.1\r\nHost: {host}\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(f"{head}0\r\n\r\nGET /health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        answer = b""
        while part := connection.recv(4096):
            answer += part
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1


def test_a_body_that_does_not_come(start: Callable[..., str]) -> None:
    url = start(base_url=None, body_timeout=0.2)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"POST /v1/refine HTTP/1.1\r\nHost: {host}\r\nContent-Length: 10\r\n\r\n{{".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


NO_OBJECTS = [
    b"", b"{", b"5", b"null", b"[]", b'"x"', b"\xff\xfe", b"{}{}", b'{"prompt": NaN}', b'{"seed": 1e999}',
    b'{"a": Infinity}',
    b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": "a", "metadata": ' + b'{"a":' * 200 + b"1" + b"}" * 201,
    b'{"id": ' + b"9" * 5000 + b"}",
]  # fmt: skip


def test_bodies_that_are_no_json_object(start: Callable[..., str]) -> None:
    url = start(base_url=None)
    for path in ("/v1/refine", "/v1/chat/completions"):
        for content in NO_OBJECTS:
            response = http.post(url + path, content=content, headers={"Content-Type": "application/json"})
            assert response.status_code == 400, content[:50]
            assert response.json()["error"]["type"] == "invalid_request_error"


def test_numbers_of_any_size_come_back(start: Callable[..., str]) -> None:
    body = b'{"prompt": "a", "id": ' + b"9" * 4000 + b', "metadata": {"x": 1e308, "\\ud800": "\\udfff"}}'
    response = http.post(
        start(base_url=None) + "/v1/refine", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 200
    assert response.json()["id"] == 10**4000 - 1
    assert response.json()["metadata"] == {"x": 1e308, "\ud800": "\udfff"}


def test_no_more_than_allowed_at_once(start: Callable[..., str], base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    base.held_after = 1
    url = start(max_in_progress=2)
    with httpx.Client(timeout=PATIENCE) as client:
        with (
            client.stream("POST", f"{url}/v1/refine", json={"prompt": "a", "draft_model": MODEL, "stream": True}) as one,
            client.stream("POST", f"{url}/v1/refine", json={"prompt": "b", "draft_model": MODEL, "stream": True}) as two,
        ):  # fmt: skip
            assert one.status_code == two.status_code == 200
            monkeypatch.setattr(AsyncRefiner, "retry_after", 6.3)  # as long as the engine's queue takes
            third = http.post(f"{url}/v1/refine", json=REQUEST)
            assert status(third) == (429, "too_many_requests")
            assert third.headers["retry-after"] == "7"
            assert http.get(f"{url}/health").status_code == 200
        wait_until(lambda: base.left_early == 2)
        wait_until(lambda: client.post(f"{url}/v1/refine", json=REQUEST).status_code == 200)


def test_the_time_limit_holds_for_the_base_api_too(
    start: Callable[..., str], base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.server.gate.GRACE", 0.1)
    base.held_after = 1
    url = start(timeout=0.3)
    while not base.begun:  # more than once where the machine is so slow that the base API is not asked in time
        before = time.monotonic()
        assert status(http.post(f"{url}/v1/chat/completions", json=CHAT)) == (504, "timeout")
        assert time.monotonic() - before < 20  # the base API itself would say nothing for ever
    wait_until(lambda: base.left_early == base.begun)


@pytest.mark.parametrize(
    "settings",
    [
        {"timeout": 0}, {"timeout": float("inf")}, {"max_list": 0}, {"max_body_bytes": True}, {"token": ""}, {"token": "a b"},
        {"token": "é"}, {"base_url": "ftp://x"}, {"base_url": "http://user:pw@x/v1"}, {"max_new_tokens": 5},
        {"base_key": "a\nb"},
    ],
)  # fmt: skip
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|above"):
        Settings(**settings)


def test_secrets_are_not_shown() -> None:
    assert "s3cret" not in repr(Settings(token="s3cret", base_key="s3cret"))
