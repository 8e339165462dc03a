"""Similarities on what can be counted by hand."""

from hypothesis import given
from hypothesis import strategies as st

from engine.evaluate.overlap import agreement, similarity, word_similarity

TOKENS = st.lists(st.integers(0, 4), max_size=12)


def test_by_hand() -> None:
    assert similarity([1, 2, 3, 4], [1, 2, 9, 4]) == 0.75
    assert word_similarity("put the egg  in", "put an egg in") == 0.75
    assert similarity([], []) == word_similarity("", " ") == 1.0
    assert agreement([1, 2, 3], [1, 9]) == 1 / 3
    assert agreement([], []) == 0.0


@given(TOKENS, TOKENS)
def test_bounds(a: list[int], b: list[int]) -> None:
    assert 0.0 <= similarity(a, b) <= 1.0
    assert (similarity(a, b) == 1.0) == (a == b)
