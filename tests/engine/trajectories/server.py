"""An OpenAI-compatible server on the loopback interface that fails now and then."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Flaky:
    """What the server does and has done."""

    faults: list[str] = field(default_factory=list)
    """Of the requests to come, in turn: ok, 429, 429date, 500, slow (no answer until the client leaves), cut, garbage, empty,
    400, 401."""
    newer: frozenset[str] = frozenset()
    """Models that refuse max_tokens; the others do not know its newer name."""
    always: str | None = None
    delay: float = 0.0
    retry_after: str = "0.2"
    silent_after: int | None = None
    """So many answers, and the next requests wait as with slow."""
    url: str = ""
    answered: Counter[tuple[str, str]] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_fault(self) -> str:
        with self.lock:
            fault = self.always or (self.faults.pop(0) if self.faults else "ok")
            self.seen[fault] += 1
            return fault

    def may_answer(self, model: str, prompt: str) -> bool:
        """Counts the answer, unless there are enough."""
        with self.lock:
            if self.silent_after is not None and self.answered.total() >= self.silent_after:
                return False
            self.answered[model, prompt] += 1
            return True


def text_of(model: str, prompt: str) -> str:
    """What the server answers."""
    return f"{model} says: {prompt[::-1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    flaky: Flaky

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        flaky = self.flaky
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with flaky.lock:
            flaky.bodies.append(body)
            flaky.headers.append(dict(self.headers))
            flaky.at_once += 1
            flaky.most_at_once = max(flaky.most_at_once, flaky.at_once)
        try:
            time.sleep(flaky.delay)
            self._answer(flaky.next_fault(), body)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with flaky.lock:
                flaky.at_once -= 1

    def _answer(self, fault: str, body: dict[str, Any]) -> None:
        model, prompt = body["model"], body["messages"][-1]["content"]
        good = {
            "choices": [{"message": {"content": text_of(model, prompt)}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5},
        }
        wanted, other = ("max_tokens", "max_completion_tokens")[:: -1 if model in self.flaky.newer else 1]
        if fault == "ok" and other in body:
            message = f"Unsupported parameter: '{other}' is not supported with this model. Use '{wanted}' instead."
            self._send(400, json.dumps({"error": {"message": message, "code": "unsupported_parameter"}}).encode())
            return
        if fault == "slow":
            self._wait_until_client_leaves()
        elif fault == "cut":
            data = json.dumps(good).encode()
            self._head(200, len(data))
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif fault in ("429", "429date"):
            wait = {"429": self.flaky.retry_after, "429date": "Thu, 01 Jan 2026 00:00:00 GMT"}[fault]
            self._send(429, b'{"error": "too many"}', {"Retry-After": wait})
        elif fault in ("400", "401", "500"):
            self._send(int(fault), b'{"error": "no"}')
        elif fault == "garbage":
            self._send(200, b'{"choices": [')
        elif fault == "empty":
            good["choices"][0]["message"]["content"] = " "  # type: ignore[index]
            self._send(200, json.dumps(good).encode())
        else:
            if fault == "length":
                good["choices"][0]["finish_reason"] = "length"  # type: ignore[index]
            if self.flaky.may_answer(model, prompt):
                self._send(200, json.dumps(good).encode())
            else:
                self._wait_until_client_leaves()

    def _wait_until_client_leaves(self) -> None:
        """By its timeout, or by its end: it sends nothing more."""
        self.connection.settimeout(120)
        assert not self.connection.recv(1)
        self.close_connection = True

    def _head(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), "Connection": "close", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(status, len(data), headers)
        self.wfile.write(data)
        self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that was killed


@contextmanager
def serve(flaky: Flaky) -> Iterator[Flaky]:
    """Runs the server in a ``with`` block."""
    handler = type("Handler", (_Handler,), {"flaky": flaky})
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        flaky.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield flaky
        finally:
            server.shutdown()
            thread.join()
