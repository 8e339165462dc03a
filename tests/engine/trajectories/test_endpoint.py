"""Building from endpoints that fail: complete, ordered, nothing twice, resumable."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.trajectories import endpoint
from engine.trajectories.endpoint import Endpoint, EndpointError, EndpointRefused, Pool, Sampling, completions_url
from tests.engine.trajectories.helpers import call, read, write
from tests.engine.trajectories.server import Flaky, serve, text_of

CHAT = [{"role": "user", "content": "hello"}]
SAMPLING = Sampling()
MODELS = ["small", "large"]


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)


def prompts(folder: Path, count: int) -> Path:
    return write(folder / "prompts.jsonl", [{"prompt_id": f"p{i}", "prompt": f"Question {i}?"} for i in range(count)])


def arguments(folder: Path, flaky: Flaky, *more: object) -> list[object]:
    models = [value for name in MODELS for value in ("--model", name)]
    return [
        "build", "--prompts", folder / "prompts.jsonl", "--output", folder / "out.jsonl", "--endpoint", flaky.url,
        *models, "--concurrency", 4, *more,
    ]  # fmt: skip


def expected(count: int) -> list[dict[str, object]]:
    return [
        {
            "prompt_id": f"p{i}",
            "prompt": f"Question {i}?",
            "responses": [
                {"model": model, "text": text_of(model, f"Question {i}?"), "reward": None} for model in MODELS
            ],
        }
        for i in range(count)
    ]


@pytest.mark.usefixtures("_quick")
def test_a_server_that_fails_now_and_then(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts(tmp_path, 20)
    faults = ["429", "ok", "500", "cut", "429date", "ok", "garbage", "ok", "cut", "cut", "500", "429"] * 2
    with serve(Flaky(faults=["slow", "slow", *faults])) as flaky:
        # long enough that no good answer ever misses it; both slow ones are waited for at once
        assert call(*arguments(tmp_path, flaky, "--timeout", 4, "--price-in", 1, "--price-out", 2)) == 0
        assert read(tmp_path / "out.jsonl") == expected(20)
        assert flaky.seen["slow"] == 2
        assert list(flaky.answered.values()) == [1] * len(MODELS) * 20
        assert flaky.most_at_once <= 4 + flaky.seen["slow"]
        seeds = {body["seed"] for body in flaky.bodies}
        assert len(seeds) == len(MODELS) * 20
        before = (tmp_path / "out.jsonl").read_bytes()
        asked = len(flaky.bodies)
        assert call(*arguments(tmp_path, flaky, "--price-in", 1, "--price-out", 2)) == 0
        assert len(flaky.bodies) == asked
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert (
        "20 answers (0 cut at the limit), 200 prompt tokens, 100 answer tokens, cost 0.0004" in capsys.readouterr().err
    )
    assert not (tmp_path / "out.jsonl.errors").exists()


def test_killed_and_resumed(tmp_path: Path) -> None:
    count = 30
    prompts(tmp_path, count)
    with serve(Flaky(delay=0.05, faults=["ok", "500", "cut"] * 3)) as flaky:
        command = [sys.executable, "-m", "engine.trajectories", *map(str, arguments(tmp_path, flaky))]
        for answers in (5, 20):
            flaky.silent_after = answers  # so that it cannot be done before it is killed
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
            deadline = time.monotonic() + 120
            while flaky.answered.total() < answers and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert flaky.answered.total() == answers
            assert not (tmp_path / "out.jsonl").exists()
        flaky.silent_after = None
        kept = (tmp_path / "out.jsonl.responses").read_bytes().count(b"\n")
        assert kept >= 10
        with (tmp_path / "out.jsonl.responses").open("ab") as journal:
            journal.write(b'{"prompt_id": "torn')
        assert call(*arguments(tmp_path, flaky)) == 0
        assert read(tmp_path / "out.jsonl") == expected(count)
        assert len(read(tmp_path / "out.jsonl.responses")) == len(MODELS) * count
        # what a killed run had asked for and not written yet is asked for again: one round of requests per kill
        assert sum(flaky.answered.values()) <= len(MODELS) * count + 2 * 2 * 4


@pytest.mark.usefixtures("_quick")
def test_each_model_gets_the_limit_under_the_name_it_takes(tmp_path: Path) -> None:
    prompts(tmp_path, 6)
    with serve(Flaky(newer=frozenset(["large"]))) as flaky:
        assert call(*arguments(tmp_path, flaky, "--concurrency", 1, "--retries", 0, "--max-tokens", 77)) == 0
        names = ("max_tokens", "max_completion_tokens")
        sent = [(body["model"], *(body.get(name) for name in names)) for body in flaky.bodies]
    assert read(tmp_path / "out.jsonl") == expected(6)
    assert sent.count(("large", 77, None)) == 1  # once was enough to learn it
    assert sent.count(("large", None, 77)) == sent.count(("small", 77, None)) == 6
    assert len(sent) == 13


@pytest.mark.usefixtures("_quick")
def test_another_refusal_of_the_limit_is_told(tmp_path: Path) -> None:
    """By a server that takes neither name, or not this many."""
    with serve(Flaky(faults=["ok", "400"], newer=frozenset(["large"]))) as flaky:
        client = Endpoint(completions_url(flaky.url), retries=2)
        with pytest.raises(EndpointError, match="status 400"):
            client.ask("large", CHAT, SAMPLING, 1)
        assert len(flaky.bodies) == 2
        client.close()


@pytest.mark.usefixtures("_quick")
def test_failures_are_told_and_retried_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts(tmp_path, 3)
    with serve(Flaky(faults=["400", "empty"])) as flaky:
        assert call(*arguments(tmp_path, flaky, "--concurrency", 1)) == 3
        told = read(tmp_path / "out.jsonl.errors")
        assert [(line["prompt_id"], line.get("model")) for line in told] == [
            ("p0", "small"), ("p0", "large"), ("p0", None)
        ]  # fmt: skip
        assert "status 400" in told[0]["error"]["message"]
        assert read(tmp_path / "out.jsonl") == expected(3)[1:]
        assert call(*arguments(tmp_path, flaky, "--retry-errors")) == 0
        assert read(tmp_path / "out.jsonl") == expected(3)
        assert sum(flaky.answered.values()) == 6
        assert call(*arguments(tmp_path, flaky, "--seed", 1)) == 2
    assert "options seed 0, now 1" in capsys.readouterr().err


@pytest.mark.usefixtures("_quick")
def test_an_endpoint_that_refuses_everything_ends_the_job(tmp_path: Path) -> None:
    prompts(tmp_path, 50)
    with serve(Flaky(faults=["ok"] * 3 + ["401"] * 99)) as flaky:
        # one at a time: of several at once a refusal can overtake an answer
        assert call(*arguments(tmp_path, flaky, "--concurrency", 1)) == 1
        assert len(flaky.bodies) == 4
        assert len(read(tmp_path / "out.jsonl.responses")) == 3
        assert call(*arguments(tmp_path, flaky)) == 1
        assert len(flaky.bodies) <= 4 + 2 * 4
        flaky.faults.clear()
        assert call(*arguments(tmp_path, flaky)) == 0
    assert read(tmp_path / "out.jsonl") == expected(50)


@pytest.mark.usefixtures("_quick")
def test_two_endpoints_and_answers_that_are_there_already(tmp_path: Path) -> None:
    """One of them cuts its answers; a prompt that has a model's answer is not asked again."""
    rows = [{"prompt_id": f"p{i}", "prompt": f"Question {i}?"} for i in range(2)]
    rows[0]["responses"] = [{"model": "large", "text": "known", "reward": 3.0}]  # type: ignore[assignment]
    rows[1]["responses"] = []  # type: ignore[assignment]
    write(tmp_path / "prompts.jsonl", rows)
    with serve(Flaky()) as small, serve(Flaky(always="length")) as large:
        assert call(*arguments(tmp_path, small, "--endpoint", large.url)) == 0
        assert [sum(flaky.answered.values()) for flaky in (small, large)] == [2, 1]
    first, second = read(tmp_path / "out.jsonl")
    assert [(r["model"], r["reward"]) for r in first["responses"]] == [("large", 3.0), ("small", None)]
    assert [r.get("truncated") for r in second["responses"]] == [None, True]


@pytest.mark.usefixtures("_quick")
def test_an_endpoint_that_is_gone_ends_the_job(tmp_path: Path) -> None:
    prompts(tmp_path, 50)
    with serve(Flaky()) as flaky:
        pass
    assert call(*arguments(tmp_path, flaky, "--retries", 0, "--concurrency", 1)) == 1
    assert len(read(tmp_path / "out.jsonl.responses")) <= 8
    assert not (tmp_path / "out.jsonl").exists()


def test_sigterm_keeps_what_is_there(tmp_path: Path) -> None:
    prompts(tmp_path, 200)
    with serve(Flaky()) as flaky:
        command = [sys.executable, "-m", "engine.trajectories", *map(str, arguments(tmp_path, flaky))]
        flaky.silent_after = 8
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while flaky.answered.total() < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.terminate()
        assert b"the same command goes on" in process.communicate(timeout=120)[1]
        assert process.returncode == 143
    assert len(read(tmp_path / "out.jsonl.responses")) >= 4


@pytest.mark.usefixtures("_quick")
def test_retry_after_is_waited_for(tmp_path: Path) -> None:
    with serve(Flaky(faults=["429"], retry_after="0.5")) as flaky:
        client = Endpoint(completions_url(flaky.url), key="secret")
        started = time.monotonic()
        assert client.ask("small", CHAT, SAMPLING, 1).text == text_of("small", "hello")
        assert time.monotonic() - started >= 0.5
        assert flaky.headers[0]["Authorization"] == "Bearer secret"
        assert flaky.bodies[0] == {
            "model": "small", "messages": CHAT, "max_tokens": 1024, "temperature": 0.7, "seed": 1
        }  # fmt: skip
        client.close()


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(("fault", "attempts"), [("500", 3), ("cut", 3), ("garbage", 3), ("400", 1), ("empty", 1)])
def test_attempts_end(fault: str, attempts: int) -> None:
    with serve(Flaky(always=fault)) as flaky:
        client = Endpoint(completions_url(flaky.url), retries=2)
        with pytest.raises(EndpointError):
            client.ask("small", CHAT, SAMPLING, 1)
        assert len(flaky.bodies) == attempts
        client.close()


def test_close_ends_waiting() -> None:
    with serve(Flaky(always="429", retry_after="60")) as flaky:
        client, pool = Endpoint(completions_url(flaky.url)), Pool(1)
        pool.add(0, lambda: client.ask("small", CHAT, SAMPLING, 1))
        while not flaky.bodies:
            time.sleep(0.01)
        threading.Timer(0.1, client.close).start()
        ((_, error),) = pool.finished(timeout=10)
        assert isinstance(error, EndpointError)
        pool.close()


def test_wrong_setup_is_refused_at_once() -> None:
    with serve(Flaky(always="401")) as flaky:
        client = Endpoint(completions_url(flaky.url))
        with pytest.raises(EndpointRefused, match="--api-key-env"):
            client.ask("small", CHAT, SAMPLING, 1)
        client.close()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None), ({"retry-after": "3"}, 3.0), ({"retry-after": "-3"}, 0.0), ({"retry-after": "soon"}, None),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, 50.0), ({"retry-after": "nan"}, None),
    ],
)  # fmt: skip
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert endpoint.retry_after(headers, now=10.0) == seconds


@pytest.mark.parametrize(
    ("url", "posted"),
    [
        ("http://a:1", "http://a:1/v1/chat/completions"),
        ("http://a/v1/", "http://a/v1/chat/completions"),
        ("https://a/api/openai", "https://a/api/openai/chat/completions"),
        ("https://a/v1/chat/completions", "https://a/v1/chat/completions"),
    ],
)
def test_url(url: str, posted: str) -> None:
    assert completions_url(url) == posted


@pytest.mark.parametrize("url", ["a:1", "ftp://a", "http://", "http://a?key=1", "http://me:secret@a"])
def test_url_is_checked(url: str) -> None:
    with pytest.raises(ValueError, match="--endpoint must"):
        completions_url(url)
