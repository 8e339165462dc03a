"""The layout of a trajectory, against definitions that look at whole contexts."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import InvalidTrajectory, Trajectory
from engine.training import Layout, lay_out, rank
from tests.engine.training.references import fitted, naive_pairs

PAD = 0
tokens = st.lists(st.integers(0, 2), max_size=9)  # few values: contexts often agree for a while
some_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=9)


def context(layout: Layout, row: int) -> list[int]:
    """The tokens that a row sees, by position, under the rule of METHOD: the prompt, its own response, nothing later."""
    mine, at = layout.response_ids[row], layout.position_ids[row]
    seen = [
        (position, token)
        for position, token, response in zip(layout.position_ids, layout.input_ids, layout.response_ids, strict=True)
        if response in (0, mine) and position <= at
    ]
    assert [position for position, _ in sorted(seen)] == list(range(at + 1))
    return [token for _, token in sorted(seen)]


@given(some_tokens, some_tokens, st.lists(tokens, max_size=4), st.integers(1, 10))
def test_every_row_of_the_loss_has_the_context_of_its_definition(
    prompt: list[int], target: list[int], drafts: list[list[int]], window: int
) -> None:
    layout = lay_out(prompt, target, drafts, pad_id=PAD, window=window)
    target = target[:window]
    assert layout.labels == target
    assert [context(layout, row) for row in layout.target_rows] == [prompt + target[:i] for i in range(len(target))]
    expected = []
    for draft in drafts:
        filled = fitted(draft, len(target), PAD)
        expected += [(i, prompt + filled[:i]) for i in naive_pairs(target, filled)]
    actual = [(i, context(layout, row)) for i, row in zip(layout.pair_index, layout.draft_rows, strict=True)]
    assert actual == expected


@given(some_tokens, some_tokens, st.lists(tokens, max_size=4))
def test_tokens_of_the_row(prompt: list[int], target: list[int], drafts: list[list[int]]) -> None:
    layout = lay_out(prompt, target, drafts, pad_id=PAD)
    filled = [fitted(draft, len(target), PAD) for draft in drafts]
    kept = [draft for draft in filled if naive_pairs(target, draft)]
    n = len(target)
    assert layout.input_ids == [*prompt, *target, *itertools.chain(*kept)]
    assert layout.response_ids == [0] * len(prompt) + [r + 1 for r in range(len(kept) + 1) for _ in range(n)]
    restarts = [len(prompt) + i for _ in range(len(kept) + 1) for i in range(n)]
    assert layout.position_ids == [*range(len(prompt)), *restarts]


def test_the_off_by_ones_of_one_example() -> None:
    """x = a b, y(T) = 5 6 7 EOS, y(t) = 5 9 EOS: the first difference is index 1, the first other context that of 2."""
    layout = lay_out([11, 12], [5, 6, 7, 2], [[5, 9, 2]], pad_id=0)
    assert layout.input_ids == [11, 12, 5, 6, 7, 2, 5, 9, 2, 0]
    assert layout.position_ids == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5]
    assert layout.target_rows == [1, 2, 3, 4]  # 5 is predicted by b, EOS by 7
    assert layout.labels == [5, 6, 7, 2]
    assert layout.draft_rows == [7, 8]  # the 9, which predicts index 2, and EOS, which predicts index 3
    assert layout.pair_index == [2, 3]


@pytest.mark.parametrize("draft", [[5, 6, 7, 2], [5, 6, 7], [5, 6, 7, 2, 8, 8], [5, 6, 7, 9, 9]])
def test_a_draft_of_equal_contexts_is_not_computed(draft: list[int]) -> None:
    layout = lay_out([11], [5, 6, 7, 2], [draft], pad_id=0)
    assert layout.input_ids == [11, 5, 6, 7, 2]
    assert layout.draft_rows == layout.pair_index == []


def test_the_first_token_is_never_paired() -> None:
    """Index 0 is predicted from the prompt alone, whatever the draft."""
    layout = lay_out([11], [5, 6, 2], [[9, 9, 9]], pad_id=0)
    assert layout.pair_index == [1, 2]


@pytest.mark.parametrize(("prompt", "target"), [([], [1]), ([1], [])])
def test_empty_parts_are_refused(prompt: list[int], target: list[int]) -> None:
    with pytest.raises(InvalidTrajectory, match="at least one token each, got"):
        lay_out(prompt, target, [], pad_id=0)


def trajectory(**changes: Any) -> Trajectory:
    fields: dict[str, Any] = {"id": "a", "prompt_ids": [1], "responses": [[10], [11], [12], [13]]}
    return Trajectory(**{**fields, **changes})


@pytest.mark.parametrize(
    ("rewards", "order"),
    [
        (None, [10, 11, 12, 13]),
        ([4.0, 3.0, 2.0, 1.0], [13, 12, 11, 10]),
        ([1.0, 5.0, 5.0, 1.0], [10, 13, 11, 12]),  # ties keep their order, the last of the best is the target
        ([2.0, None, math.nan, 1], [13, 10]),
        ([None, -math.inf, 0.0, None], [11, 12]),
    ],
)
def test_ranking(rewards: list[float | None] | None, order: list[int]) -> None:
    assert rank(trajectory(rewards=rewards)) == [[token] for token in order]


def test_responses_end_at_their_first_eos_and_empty_ones_are_left_out() -> None:
    made = trajectory(responses=[[], [5, 2, 7, 2], [5, 6], [3, 8]])
    assert rank(made, eos_ids={2, 3}) == [[5, 2], [5, 6], [3]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": [1.0]}, "'a' has 4 responses and 1 rewards"),
        ({"rewards": [1, 2, "3", 4]}, r"rewards\[2\] must be a number, or None where it is missing, got '3'"),
        ({"responses": []}, "0 responses with tokens and a reward"),
        ({"rewards": [None] * 4}, "0 responses with tokens and a reward"),
        ({"prompt_ids": []}, "a prompt of 0 tokens"),
        ({"prompt_ids": [-1]}, r"prompt_ids must hold token ids, integers >= 0, got -1"),
        ({"responses": [[1], [2, "x"]]}, r"responses\[1\] must hold token ids, integers >= 0, got 'x'"),
        ({"responses": [[1.0]]}, r"got 1\.0; tokenise texts first"),
        ({"responses": ["text"]}, r"responses\[0\] must hold token ids"),
        ({"responses": [[True]]}, "got True"),
    ],
)
def test_malformed_trajectories(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidTrajectory, match=message):
        rank(trajectory(**changes))
