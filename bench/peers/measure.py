"""Takes peers through the same requests, batch by batch and in turn, and keeps what every answer cost and is worth."""

import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from bench.peers.answer import Answer, Peer
from bench.peers.catalogue import BASE, reference
from bench.peers.fluency import Reader
from engine import Request

COLUMNS = (
    "turn", "prompt", "draft", "refinement", "reward", "token_forwards", "sequential_steps", "reward_tokens",
    "cpu", "tokens", "score", "nats", "same",
)  # fmt: skip
"""Of the results: the number of the batch and of the prompt, what the answer cost, the CPU seconds of its whole batch with the
drafts it takes, its length, its reward, its nats per token where they are known, and whether its tokens are those of its
reference."""
Record = Callable[[dict[str, Any]], None]


class Judge(Protocol):
    """Says what answers are worth."""

    def judge(self, requests: Sequence[Request], answers: Sequence[Answer]) -> list[float]: ...


def measure(
    base: Peer,
    peers: Mapping[str, Peer],
    requests: Sequence[Request],
    judge: Judge,
    *,
    batches: Mapping[int, int],
    rounds: int,
    limits: Mapping[str, int],
    record: Record,
    minutes: float = math.inf,
    fluency: Reader | None = None,
) -> dict[str, Any]:
    """``batches``: of every batch size how many of the requests are asked; ``limits``: peers that get so many at most; after
    ``minutes`` no further batch begins.

    The drafts of a batch are made once, and their time counts for each peer that takes them. Between one batch and the next
    of its size the order of the peers moves on by one. ``record`` gets the results after every batch; their ``left_out`` are
    the planned batches that they do not have. With ``fluency`` answers get their nats per token, after their batch.
    """
    plan = _plan(batches, rounds)
    results: dict[str, Any] = {"loads": {f"batch {size}": [] for size in batches}, "methods": {}, "left_out": len(plan)}
    end = time.monotonic() + 60 * minutes
    nats = functools.cache(fluency.nats) if fluency else None  # many methods give the same text
    for done, (size, turn, start) in enumerate(plan):
        if time.monotonic() > end:
            record(results)
            break
        group = requests[start : min(start + size, batches[size])]
        # base always comes first, behind the judging of the batch before, which leaves its weights out of the caches: its
        # first pass is slower than those of the peers, which come behind one another, so one is made that is not timed
        base.answer(group, ())
        drafts, of_drafts = _timed(base, group, ())
        answers, cpu = {BASE: drafts}, {BASE: of_drafts}
        names = [name for name, peer in peers.items() if _takes(peer, len(group), limits.get(name), start)]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            answers[name], own = _timed(peers[name], group, drafts)
            cpu[name] = own + of_drafts * peers[name].takes_draft
        for name in (BASE, *names):
            columns = results["methods"].setdefault(name, {}).setdefault(f"batch {size}", {c: [] for c in COLUMNS})
            same = answers.get(reference(name) or "")
            columns["turn"] += [turn] * len(group)
            columns["cpu"] += [round(cpu[name], 4)] * len(group)
            columns["nats"] += [
                nats(request.prompt or "", answer.text or "") if nats else None
                for request, answer in zip(group, answers[name], strict=True)
            ]
            _add(columns, start, answers[name], judge.judge(group, answers[name]), same)
        results["loads"][f"batch {size}"].append(round(os.getloadavg()[0], 2))
        results["left_out"] = len(plan) - done - 1
        record(results)
    return results


def _timed(peer: Peer, group: Sequence[Request], drafts: Sequence[Answer]) -> tuple[list[Answer], float]:
    start = time.process_time()
    answers = peer.answer(group, drafts)
    return answers, time.process_time() - start


def _plan(batches: Mapping[int, int], rounds: int) -> list[tuple[int, int, int]]:
    """Size, number among those of its size, and first request of every batch; the sizes in turn, so that a run that is
    stopped early has some of each."""
    of_sizes = [
        [(size, turn, start) for turn, start in enumerate([*range(0, count, size)] * rounds)]
        for size, count in batches.items()
    ]
    return [batch for together in itertools.zip_longest(*of_sizes) for batch in together if batch is not None]


def _takes(peer: Peer, size: int, limit: int | None, start: int) -> bool:
    fits = peer.largest_batch is None or size <= peer.largest_batch
    return fits and (limit is None or start + size <= limit)


def _add(
    columns: dict[str, list[Any]],
    start: int,
    answers: Sequence[Answer],
    scores: Sequence[float],
    same: Sequence[Answer] | None,
) -> None:
    for index, (answer, score) in enumerate(zip(answers, scores, strict=True)):
        cost = answer.cost
        values = {
            "prompt": start + index,
            **{part: round(getattr(cost, part), 4) for part in ("draft", "refinement", "reward")},
            **{name: getattr(cost, name) for name in ("token_forwards", "sequential_steps", "reward_tokens")},
            "tokens": len(answer.token_ids),
            "score": round(score, 5),
            "same": None if same is None else answer.token_ids == same[index].token_ids,
        }
        for name, value in values.items():
            columns[name].append(value)
