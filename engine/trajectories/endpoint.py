"""Answers from an OpenAI-compatible endpoint: one request with its retries, and many at once."""

import email.utils
import json
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from engine.errors import EngineError

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds before the first retry, doubled for each further one up to the longest."""
LONGEST_ASKED = 600.0
"""A Retry-After above this many seconds is taken for this many."""
_WRONG_SETUP = (401, 403, 404, 405)
_RETRIED = (408, 409, 425, 429)
_LIMIT, _NEWER_LIMIT = "max_tokens", "max_completion_tokens"
"""The longest answer in a request; newer models refuse the first name, many servers do not know the second."""


class EndpointError(EngineError):
    """The endpoint gave no usable answer to one request, retries included; the others go on."""


class EmptyAnswer(EngineError):
    """A local model had nothing to say."""


class EndpointRefused(EngineError):
    """The endpoint refuses every request, or has been gone for too long: the job ends, the same command goes on later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A completion."""

    text: str
    truncated: bool
    """Cut at max_tokens."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What every model is asked for."""

    max_tokens: int = 1024
    temperature: float = 0.7

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"--max-tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"--temperature must be in 0 .. 2, got {self.temperature}")


def completions_url(endpoint: str) -> str:
    """Where to post: a bare host gets /v1/chat/completions, a path its /chat/completions. Raises ValueError."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"--endpoint must be a URL such as http://127.0.0.1:8000/v1, got {endpoint!r}")
    if parts.username or parts.password:  # the URL is recorded beside the output
        raise ValueError("--endpoint must not hold a user name or password: a key is given with --api-key-env")
    path = parts.path.rstrip("/") or "/v1"
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return f"{parts.scheme}://{parts.netloc}{path}"


class _Failed(Exception):
    """One attempt; ``again`` where another may succeed, after ``wait`` seconds if the server said so."""

    def __init__(self, text: str, *, again: bool, wait: float | None = None, wants_newer_limit: bool = False) -> None:
        super().__init__(text)
        self.again, self.wait, self.wants_newer_limit = again, wait, wants_newer_limit


class Endpoint:
    """A client; threads may share it."""

    def __init__(
        self, url: str, *, key: str | None = None, timeout: float = 300.0, retries: int = 6, connections: int = 64
    ) -> None:
        try:
            import httpx2 as httpx
        except ImportError:
            raise ValueError("--endpoint needs httpx2: pip install 'diffpo-engine[endpoint]'") from None
        self.url, self._retries, self._httpx = url, retries, httpx
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(timeout=timeout, limits=limits, headers=headers)
        self._random = random.Random()  # only for waiting: spreads the retries of many clients
        self._closed = threading.Event()
        self._newer: set[str] = set()
        """Models that have asked for the newer name of the limit."""

    def ask(self, model: str, messages: list[dict[str, str]], sampling: Sampling, seed: int) -> Answer:
        """Raises EndpointError, EndpointRefused."""
        body = {"model": model, "messages": messages, "temperature": sampling.temperature, "seed": seed}
        for attempt in range(self._retries + 1):
            try:
                return self._attempt_limited(body, sampling.max_tokens)
            except _Failed as failure:
                if not failure.again:
                    raise EndpointError(f"{self.url}: {failure}") from None
                if attempt == self._retries:
                    raise EndpointError(f"{self.url}, after {attempt + 1} attempts: {failure}") from None
                if self._closed.wait(self._wait(attempt, failure.wait)):
                    raise EndpointError(f"{self.url}: closed while waiting to try again") from None
        raise AssertionError("unreachable")

    def _wait(self, attempt: int, asked: float | None) -> float:
        if asked is not None:
            return min(asked, LONGEST_ASKED) + self._random.uniform(0, FIRST_WAIT)
        return min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * self._random.uniform(0.5, 1.0)

    def _attempt_limited(self, body: dict[str, Any], most: int) -> Answer:
        """An attempt under the name of the limit that the model takes; learning that name costs no attempt."""
        model = body["model"]
        if model not in self._newer:
            try:
                return self._attempt({**body, _LIMIT: most})
            except _Failed as failure:
                if not failure.wants_newer_limit:
                    raise
            self._newer.add(model)
        return self._attempt({**body, _NEWER_LIMIT: most})

    def _attempt(self, body: dict[str, Any]) -> Answer:
        try:
            response = self._client.post(self.url, json=body)
        except (self._httpx.HTTPError, self._httpx.InvalidURL, RuntimeError) as error:
            if self._closed.is_set():
                raise EndpointError(f"{self.url}: closed") from None
            again = isinstance(error, self._httpx.TransportError)
            raise _Failed(f"{type(error).__name__}: {error}", again=again) from None
        status = response.status_code
        if status != 200:
            what = f"status {status}: {' '.join(response.text.split()):.300}"
            if status in _WRONG_SETUP:
                raise EndpointRefused(f"{self.url}, {what}; check --endpoint, --model and --api-key-env")
            again = status >= 500 or status in _RETRIED
            newer = status in (400, 422) and _NEWER_LIMIT in response.text
            raise _Failed(what, again=again, wait=retry_after(response.headers), wants_newer_limit=newer)
        return read_answer(response.content)

    def close(self) -> None:
        self._closed.set()
        self._client.close()


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds to wait, from the header as a number or a date; None where it has none."""
    text = headers.get("retry-after", "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - (time.time() if now is None else now)
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds == seconds else None


def read_answer(content: bytes) -> Answer:
    """The completion in a body; a body without one counts as a failure that may pass."""
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        text, usage = choice["message"]["content"], body.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        if not isinstance(text, str):
            raise TypeError(f"content is {type(text).__name__}")
        text.encode()
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise _Failed(f"the answer is no chat completion ({error!r:.100}): {content[:200]!r}", again=True) from None
    if not text.strip():
        raise _Failed("the answer is empty", again=False)
    return Answer(
        text=text, truncated=choice.get("finish_reason") == "length",
        prompt_tokens=tokens[0], completion_tokens=tokens[1],
    )  # fmt: skip


Task = Callable[[], Answer]


class Pool:
    """Runs tasks in threads of its own, at most ``size`` at once; daemons, because a request under way cannot be ended."""

    def __init__(self, size: int) -> None:
        self._tasks: queue.Queue[tuple[int, Task] | None] = queue.Queue()
        self._done: queue.Queue[tuple[int, Answer | BaseException]] = queue.Queue()
        self._size, self._running = size, 0
        for i in range(size):
            threading.Thread(target=self._work, name=f"engine.trajectories {i}", daemon=True).start()

    @property
    def has_room(self) -> bool:
        return self._running < self._size

    @property
    def running(self) -> int:
        return self._running

    def add(self, index: int, task: Task) -> None:
        self._running += 1
        self._tasks.put((index, task))

    def finished(self, timeout: float) -> Iterator[tuple[int, Answer | BaseException]]:
        """What has ended, after waiting for a first one."""
        try:
            item = self._done.get(timeout=timeout)
            while True:
                self._running -= 1
                yield item
                item = self._done.get_nowait()
        except queue.Empty:
            return

    def close(self) -> None:
        for _ in range(self._size):
            self._tasks.put(None)

    def _work(self) -> None:
        while task := self._tasks.get():
            try:
                self._done.put((task[0], task[1]()))
            except BaseException as error:  # told by the thread that collects
                self._done.put((task[0], error))
