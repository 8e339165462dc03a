"""The command ``python -m engine.serve``, as a process of its own."""

import inspect
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import pytest

from engine import AsyncRefiner
from engine.serve import QUEUE_DEFAULTS, build_parser, build_settings, is_loopback, main
from tests.engine.server.servers import PATIENCE, Base, http, running, wait_until

LONG = {"prompt": "How do I boil an egg?", "stream": True, "options": {"max_new_tokens": 150, "window": 1}}


@contextmanager
def command(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that listens, and its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "engine.serve", "--port", "0", *arguments], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"listening on (http://\S+)", line):
                break
        else:
            raise AssertionError("ended before it listened")
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_sigterm_lets_what_is_in_progress_finish() -> None:
    with command() as (process, url), httpx.Client(timeout=PATIENCE) as client:
        assert http.get(f"{url}/health").json() == {"status": "alive"}
        assert http.get(f"{url}/health", headers={"Host": "evil.example"}).status_code == 421
        assert "diffpo" in client.get(f"{url}/").text
        with client.stream("POST", f"{url}/v1/refine", json=LONG) as response:
            lines = response.iter_lines()
            assert next(lines) == "event: iterate"
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert any(line == "event: result" for line in rest)
        assert process.wait(30) in (0, -signal.SIGTERM)


def test_grace_ends_and_drafts_come_from_a_base_api() -> None:
    base = Base(held_after=1)
    with running(base.app()) as url:
        arguments = ("--base-url", f"{url}/v1", "--base-model", "writer", "--grace", "1", "--condition")
        with command(*arguments, OPENAI_API_KEY="secret", DIFFPO_TOKEN="s3cret") as (process, served):
            headers = {"Authorization": "Bearer s3cret"}
            assert http.get(f"{served}/v1/models").status_code == 401
            assert http.get(f"{served}/v1/models", headers=headers).json()["data"][0]["id"] == "writer"
            body: dict[str, Any] = {"model": "writer", "messages": [{"role": "user", "content": "egg?"}]}
            failures: list[Exception] = []

            def ask() -> None:
                try:
                    http.post(f"{served}/v1/chat/completions", json=body, headers=headers, timeout=PATIENCE)
                except httpx.HTTPError as error:
                    failures.append(error)

            thread = threading.Thread(target=ask)
            thread.start()
            wait_until(lambda: base.sent == 1)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) in (0, -signal.SIGINT)
            thread.join()
            wait_until(lambda: base.left_early == 1)
        assert base.headers[0]["authorization"] == "Bearer secret"
        base.release.set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines"), (["--host", "example.com"], "can be reached"),
        (["--base-url", "ftp://x"], "base API's URL"), (["--max-new-tokens", "5000"], "max_new_tokens"),
        (["--steps", "0"], "steps"), (["--timeout", "0"], "timeout"),
        (["--host", "127.0.0.1", "--model", "/nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_what_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DIFFPO_TOKEN", raising=False)
    assert main(["--port", "0", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with running(Base().app()) as url:
        assert main(["--port", url.rsplit(":", 1)[1]]) == 2
    assert "error: " in capsys.readouterr().err


def test_who_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback names alone without a token; any name with one, or where that was said."""
    monkeypatch.delenv("DIFFPO_TOKEN", raising=False)
    parse = build_parser().parse_args
    assert build_settings(parse([])).allowed_hosts == {"localhost", "127.0.0.1", "::1"}
    assert build_settings(parse(["--host", "0.0.0.0", "--allow-anyone"])).allowed_hosts is None
    monkeypatch.setenv("MINE", "s3cret")
    settings = build_settings(parse(["--host", "0.0.0.0", "--token-env", "MINE"]))
    assert (settings.token, settings.allowed_hosts) == ("s3cret", None)
    assert [is_loopback(h) for h in ("localhost", "::1", "127.8.9.1", "0.0.0.0", "10.0.0.1", "x", "")] == [
        True, True, True, False, False, False, False
    ]  # fmt: skip


def test_the_queue_is_bounded_as_an_async_refiners_is_unless_said_otherwise() -> None:
    parameters = inspect.signature(AsyncRefiner).parameters
    assert {name: parameters[name].default for name in QUEUE_DEFAULTS} == QUEUE_DEFAULTS
    with command("--max-queue-requests", "1", "--max-batch-size", "1") as (_, url):
        body = {"requests": [{"prompt": "egg"}] * 4, "options": {"max_new_tokens": 30}}
        results = http.post(f"{url}/v1/refine", json=body, timeout=PATIENCE).json()["results"]
    codes = [(result["error"] or {}).get("code") for result in results]
    assert None in codes
    assert set(codes) == {None, "QueueFull"}


def test_nothing_else_imports_the_server() -> None:
    code = "import sys, engine, engine.refine, engine.serve; engine.AsyncRefiner; engine.Refiner; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"starlette", "uvicorn", "prometheus_client", "engine.server"} & set(loaded)
