"""A ranked trajectory as one stretch of tokens: the prompt once, behind it the target and its drafts.

    row        [ x | y(T) | y(t1) | .. | y(tK) ]
    position   0 .. P-1, then P .. anew for every response

Every response attends to x and to itself. Index i of a response is predicted by the row before it: index 0 by the last
prompt row, which all responses share. There the contexts of target and draft are the same, and their divergence is zero.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine.errors import InvalidTrajectory

WINDOW = 256
"""Response tokens that are trained on; N in the paper (arXiv 2503.04240)."""
PROMPT, TARGET = 0, 1
"""Values of ``Layout.response_ids``; the drafts have the ones from 2 on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """Responses to one prompt, to be ranked; see ``rank``."""

    id: str | int
    """Names the trajectory in errors, and in the seed of its draws: unique within a data set."""
    prompt_ids: Sequence[int]
    """x in the chat template, up to where the assistant's turn starts; at least one token."""
    responses: Sequence[Sequence[int]]
    """Worst first, y(T) last, each with its end of turn where it has one."""
    rewards: Sequence[float | None] | None = None
    """One per response, None or NaN where it is missing. None: the order of ``responses`` is the ranking."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One trajectory's tokens, and which of their hidden states the loss reads. Rows count from its first token."""

    input_ids: list[int]
    position_ids: list[int]
    response_ids: list[int]
    """Of every token: PROMPT, TARGET, or 2, 3, .. for the drafts."""
    target_rows: list[int]
    """Entry i is the row that predicts y(T)_i."""
    labels: list[int]
    """y(T), EOS included."""
    draft_rows: list[int]
    """Rows of drafts that predict an index of the response with a context other than the target's."""
    pair_index: list[int]
    """For each of ``draft_rows`` the entry of ``target_rows`` that predicts the same index."""


def lay_out(
    prompt: Sequence[int], target: Sequence[int], drafts: Sequence[Sequence[int]], *, pad_id: int, window: int = WINDOW
) -> Layout:
    """The row of one prompt, its target y(T) and the chosen drafts (arXiv 2503.04240, with Consistency LLM's pairing).

    Only the first ``window`` tokens of the target count, and of a draft as many as of the target: a shorter draft is
    filled with ``pad_id``, which stays in the loss, as the tail of a guess is filled at inference. A draft whose contexts
    never differ from the target's has no term and no tokens in the row. Raises ``InvalidTrajectory`` where prompt or
    target are empty.
    """
    if not prompt or not target:
        raise InvalidTrajectory(
            f"prompt and target need at least one token each, got {len(prompt)} and {len(target)}; leave the trajectory out"
        )
    first, target = len(prompt), list(target[:window])
    n = len(target)
    input_ids, response_ids = [*prompt, *target], [PROMPT] * first + [TARGET] * n
    draft_rows: list[int] = []
    pair_index: list[int] = []
    for draft in drafts:
        filled = [*draft[:n], *[pad_id] * (n - len(draft))]
        differs = _first_difference(target, filled) + 1  # the contexts hold what lies before an index
        if differs >= n:
            continue
        start = len(input_ids)
        draft_rows += range(start + differs - 1, start + n - 1)
        pair_index += range(differs, n)
        response_ids += [response_ids[-1] + 1] * n
        input_ids += filled
    responses = (len(input_ids) - first) // n
    return Layout(
        input_ids=input_ids,
        position_ids=[*range(first), *[first + i for _ in range(responses) for i in range(n)]],
        response_ids=response_ids,
        target_rows=[first - 1 + i for i in range(n)],
        labels=target,
        draft_rows=draft_rows,
        pair_index=pair_index,
    )


def rank(trajectory: Trajectory, eos_ids: Collection[int] = ()) -> list[list[int]]:
    """The usable responses, worst first, the target last; each ends with its first token of ``eos_ids`` if it has one.

    The paper is silent about ties and gaps. The rule here: a response without a reward (None or NaN) is left out, as is
    an empty one; the others are sorted by reward, and those of equal reward keep the order in which they were given, so
    that the last of the best is the target. Equal rewards are no reason to leave a response out: it remains a draft.
    Raises ``InvalidTrajectory`` where nothing usable is left or the data are malformed.
    """
    rewards = trajectory.rewards
    if rewards is not None and len(rewards) != len(trajectory.responses):
        raise InvalidTrajectory(
            f"trajectory {trajectory.id!r} has {len(trajectory.responses)} responses and {len(rewards)} rewards; "
            "give one per response, None where it is missing"
        )
    check_ids(trajectory.id, "prompt_ids", trajectory.prompt_ids)
    kept: list[tuple[float, list[int]]] = []
    for index, response in enumerate(trajectory.responses):
        reward = 0.0 if rewards is None else rewards[index]
        check_ids(trajectory.id, f"responses[{index}]", response)
        if reward is not None and not isinstance(reward, int | float):
            raise InvalidTrajectory(
                f"trajectory {trajectory.id!r}: rewards[{index}] must be a number, or None where it is missing, got {reward!r}"
            )
        if reward is not None and not math.isnan(reward) and len(response):
            kept.append((reward, _until_eos(response, eos_ids)))
    if not kept or not len(trajectory.prompt_ids):
        raise InvalidTrajectory(
            f"trajectory {trajectory.id!r} has a prompt of {len(trajectory.prompt_ids)} tokens and {len(kept)} responses "
            "with tokens and a reward; it needs at least one of each: leave it out of the data set"
        )
    kept.sort(key=lambda pair: pair[0])
    return [response for _, response in kept]


def check_ids(trajectory_id: str | int, name: str, ids: Sequence[int]) -> None:
    """Raises ``InvalidTrajectory`` unless ``ids`` are plain non-negative integers."""
    for token in ids:
        if type(token) is not int or token < 0:
            raise InvalidTrajectory(
                f"trajectory {trajectory_id!r}: {name} must hold token ids, integers >= 0, got {token!r}; "
                "tokenise texts first, and turn tensors into lists"
            )


def _until_eos(response: Sequence[int], eos_ids: Collection[int]) -> list[int]:
    end = next((index + 1 for index, token in enumerate(response) if token in eos_ids), len(response))
    return list(response[:end])


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
