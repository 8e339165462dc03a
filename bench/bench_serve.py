"""`python -m engine.serve` under more requests than it can serve, and what HTTP costs beside the engine in one's own process.

python -m bench.bench_serve [--seconds S] [--clients N] [--loads 0.5,1,2,3] [--name serve]

The refiner that ships, on the demo's drafts cut off at many places. The server is a process of its own, the clients are
connections of this one over loopback. Load as in bench.bench_async. Then,
in turn, closed loops through the server and through an AsyncRefiner in this process, of many clients and of a single one:
there the server has a core for the engine and one for the clients where the other has both in one process, so their
ratio says what a user gets, not what HTTP takes. Every answer is compared. Writes bench/results/serve.json.
"""

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

from bench.bench_async import InProcess, about, parser
from bench.bench_refine import read_drafts
from bench.load import LIMITS, QUEUE, Shed, Subject
from bench.measure import save
from engine import RefineOptions
from engine.refiner import DEFAULT_CHECKPOINT

OPTIONS = RefineOptions(max_new_tokens=128)
CUTS = 10
"""Lengths at which every draft is cut off."""

ROUNDS = 5
LOOPBACK = "127.0.0.1"
REUSED_WITHIN = 3.0
"""Seconds after which a connection is not used again: a little later the server closes it."""


class OverHTTP(Subject):
    """A server on the loopback interface; connections are kept and used again."""

    def __init__(self, folder: Path, requests: list[dict[str, Any]], options: RefineOptions) -> None:
        super().__init__(folder, requests, options)
        self.server = subprocess.Popen(
            [
                sys.executable, "-m", "engine.serve", "--model", str(folder), "--port", "0",
                f"--max-queue-requests={QUEUE}", f"--max-in-progress={8 * QUEUE}",
                *(f"--{name.replace('_', '-')}={value}" for name, value in LIMITS.items()),
            ],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )  # fmt: skip
        assert self.server.stderr is not None
        found = None
        while found is None:
            line = self.server.stderr.readline()
            assert line, f"the server ended with status {self.server.wait()}"
            found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", line)
        self.port = int(found[1])
        self._idle: deque[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = deque()
        self._options = {"max_new_tokens": options.max_new_tokens}

    @property
    def process(self) -> int:
        return self.server.pid

    async def answer(self, request: dict[str, Any]) -> tuple[Any, list[int]]:
        status, headers, body = await self.fetch("POST", "/v1/refine", {**request, "options": self._options})
        if status == 429:
            raise Shed(float(headers["retry-after"]))
        if status != 200:
            raise RuntimeError(f"{status}: {body!r}")
        answer = json.loads(body)
        return answer["id"], answer["token_ids"]

    async def fetch(self, method: str, path: str, value: Any = None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body. A client as small as can be, so that it takes little from the server."""
        now = time.monotonic()
        while self._idle and self._idle[0][0] < now - REUSED_WITHIN:
            self._idle.popleft()[2].close()
        _, reader, writer = (
            self._idle.pop() if self._idle else (now, *await asyncio.open_connection(LOOPBACK, self.port))
        )
        body = b"" if value is None else json.dumps(value).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in lines if line)}
        content = await reader.readexactly(int(headers["content-length"]))
        self._idle.append((time.monotonic(), reader, writer))
        return int(status.split()[1]), headers, content

    async def close(self) -> None:
        for _, _, writer in self._idle:
            writer.close()
        self.server.terminate()
        await asyncio.to_thread(self.server.wait, 60)


def demo_requests() -> list[dict[str, Any]]:
    rows = read_drafts(Path(__file__).parent / "demo" / "drafts.jsonl", 20)
    drafts = [(row["prompt"], row["draft"]) for row in rows]
    return [
        {"prompt": prompt, "draft": draft[: len(draft) * cut // CUTS]}
        for prompt, draft in drafts
        for cut in range(1, CUTS + 1)
    ]


async def measure(clients: int, seconds: float, loads: list[float]) -> dict[str, Any]:
    requests = demo_requests()
    subject = OverHTTP(DEFAULT_CHECKPOINT, requests, OPTIONS)
    try:
        out = await subject.under(clients, seconds, loads)
        out["sent in all"] = sum(part["sent"] for part in out.values())
        await asyncio.sleep(1)
        _, _, metrics = await subject.fetch("GET", "/metrics")
        out["at rest"] = levels(metrics.decode())
        out["counted by the clients"], out["counted by the server"] = dict(subject.counted), ends(metrics.decode())
        print(*(f"{name}: {out[name]}" for name in (*out,)[-3:]), sep="\n", flush=True)
        out["against the engine in one process"] = await compare(
            subject, InProcess(DEFAULT_CHECKPOINT, requests, OPTIONS), clients, seconds / 20
        )
    finally:
        await subject.close()
    return out


def levels(metrics: str) -> dict[str, float]:
    """Gauges of /metrics: who waits, who runs, what is free."""
    gauges = re.findall(r"^# TYPE (\S+)(?<!_created) gauge$", metrics, re.M)
    return {name: float(match[1]) for name in gauges if (match := re.search(rf"^{name} (\S+)$", metrics, re.M))}


def ends(metrics: str) -> dict[str, int]:
    """How requests ended by the server's own account, which a lost or doubled answer would make another than the clients'."""
    found = re.findall(r'^diffpo_requests_total{reason="(\w+)"} (\S+)$', metrics, re.M)
    counts = {reason: int(float(count)) for reason, count in found}
    answered = sum(counts.pop(reason, 0) for reason in ("eos", "length", "steps"))
    return {"answered": answered, "refused": counts.pop("shed", 0), **counts}


async def compare(served: OverHTTP, own: InProcess, clients: int, seconds: float) -> dict[str, Any]:
    out: dict[str, Any] = {}
    async with own.refiner:
        for count in (clients, 1):
            rounds: list[tuple[dict[str, Any], dict[str, Any]]] = []
            for _ in range(ROUNDS + 1):
                rounds.append((await served.closed_loop(count, seconds), await own.closed_loop(count, seconds)))
            del rounds[0]  # warm-up
            wrong = sum(
                part["wrong answers"] + part["lost"] + len(part["other errors"]) for pair in rounds for part in pair
            )
            out[f"{count} clients"] = {
                "answers/s, served": [a["answers/s"] for a, _ in rounds],
                "answers/s, one process": [b["answers/s"] for _, b in rounds],
                "throughput, served / one process": statistics.median(
                    a["answers/s"] / b["answers/s"] for a, b in rounds
                ),
                "p50 ms, served - one process": statistics.median(
                    a["latency ms"]["p50"] - b["latency ms"]["p50"] for a, b in rounds
                ),
                "wrong, lost or failed": wrong,
            }
            print(f"{count} clients:", out[f"{count} clients"], flush=True)
    return out


def main() -> None:
    options = parser(__doc__, "serve")
    options.set_defaults(loads="0.5,1,2,3", seconds=150.0)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    loads = [float(load) for load in args.loads.split(",")]
    print(save(args.name, about(args, OPTIONS) | asyncio.run(measure(args.clients, args.seconds, loads))))


if __name__ == "__main__":
    main()
