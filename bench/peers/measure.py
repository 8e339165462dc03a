"""Takes peers through the same requests, batch by batch and in turn, and keeps what every answer cost and is worth."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from bench.peers.answer import Answer, Peer
from bench.peers.catalogue import BASE, reference
from engine import Request

COLUMNS = (
    "turn", "prompt", "draft", "refinement", "reward", "token_forwards", "sequential_steps", "reward_tokens",
    "tokens", "score", "same",
)  # fmt: skip
"""Of the results: the number of the batch and of the prompt, what the answer cost, its length and reward, and whether its
tokens are those of its reference."""
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
) -> dict[str, Any]:
    """``batches``: of every batch size how many of the requests are asked; ``limits``: peers that get so many at most.

    The drafts of a batch are made once per round, and their time counts for each peer that takes them. Between one batch
    and the next the order of the peers moves on by one. ``record`` gets the results after every batch.
    """
    results: dict[str, Any] = {"loads": {}, "methods": {}}
    for size, count in batches.items():
        loads = results["loads"].setdefault(f"batch {size}", [])
        for turn, start in _turns(count, size, rounds):
            group = requests[start : min(start + size, count)]
            drafts = base.answer(group, ())
            answers = {BASE: drafts}
            names = [name for name, peer in peers.items() if _takes(peer, len(group), limits.get(name), start)]
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                answers[name] = peers[name].answer(group, drafts)
            for name, given in answers.items():
                columns = results["methods"].setdefault(name, {}).setdefault(f"batch {size}", {c: [] for c in COLUMNS})
                same = answers.get(reference(name) or "")
                _add(columns, turn, start, given, judge.judge(group, given), same)
            loads.append(round(os.getloadavg()[0], 2))
            record(results)
    return results


def _turns(count: int, size: int, rounds: int) -> Iterator[tuple[int, int]]:
    """Number and first request of every batch."""
    starts = [start for _ in range(rounds) for start in range(0, count, size)]
    return iter(enumerate(starts))


def _takes(peer: Peer, size: int, limit: int | None, start: int) -> bool:
    fits = peer.largest_batch is None or size <= peer.largest_batch
    return fits and (limit is None or start + size <= limit)


def _add(
    columns: dict[str, list[Any]],
    turn: int,
    start: int,
    answers: Sequence[Answer],
    scores: Sequence[float],
    same: Sequence[Answer] | None,
) -> None:
    for index, (answer, score) in enumerate(zip(answers, scores, strict=True)):
        cost = answer.cost
        values = (
            turn, start + index, *(round(seconds, 4) for seconds in (cost.draft, cost.refinement, cost.reward)),
            cost.token_forwards, cost.sequential_steps, cost.reward_tokens, len(answer.token_ids), round(score, 5),
            None if same is None else answer.token_ids == same[index].token_ids,
        )  # fmt: skip
        for name, value in zip(COLUMNS, values, strict=True):
            columns[name].append(value)
