"""Where the answer goes on in the draft."""

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.realign import LONGEST_MATCH, Realigner, Source

TOKENS = st.lists(st.integers(0, 3), max_size=25)


def common(context: list[int], tokens: list[int], place: int) -> int:
    n = 0
    while n < min(LONGEST_MATCH, place, len(context)) and tokens[place - 1 - n] == context[-1 - n]:
        n += 1
    return n


@settings(max_examples=300, deadline=None)
@given(TOKENS, TOKENS, st.one_of(st.none(), st.integers(0, 25)), st.integers(0, 26), st.integers(0, 25))
def test_after_is_the_longest_then_nearest_match(
    tokens: list[int], context: list[int], expected: int | None, before: int, split: int
) -> None:
    source = Source(tokens[:split])
    source.extend(tokens[split:])
    places = [p for p in range(2, len(tokens) + 1) if p < before and common(context, tokens, p) >= 2]
    if not places:
        assert source.after(context, expected, before) is None
        return
    found = source.after(context, expected, before)
    assert found in places

    def score(place: int) -> tuple[int, int]:
        return common(context, tokens, place), -place if expected is None else abs(place - expected)

    longest = max(common(context, tokens, place) for place in places)
    distances = [score(place)[1] for place in places if score(place)[0] == longest]
    assert score(found) == (longest, min(distances) if expected is not None else score(found)[1])


def propose(draft: list[int], answer: list[int], kept: int = 0) -> list[int] | None:
    realigner = Realigner(draft, kept)
    realigner.accept(answer[kept:])
    return realigner.propose()


def test_insertion_deletion_and_substitution() -> None:
    draft = [11, 12, 13, 14, 15, 16, 17, 18]
    assert propose(draft, [11, 12, 99, 13, 14]) == [15, 16, 17, 18]
    assert propose(draft, [11, 12, 15, 16]) == [17, 18]
    assert propose(draft, [11, 12, 99, 14]) == [15, 16, 17, 18]  # one token matches nearby
    assert propose(draft, [11, 12, 99, 98]) is None


def test_the_nearest_of_equally_long_matches() -> None:
    draft = [1, 2, 31, 5, 6, 7, 8, 9, 1, 2, 32]
    assert propose(draft, [7, 1, 2]) == [31, 5, 6, 7, 8, 9, 1, 2, 32]
    assert propose(draft, [7] * 6 + [71, 1, 2]) == [32]


def test_earlier_iterates_and_the_answer_itself_are_sources() -> None:
    realigner = Realigner([], 0)
    realigner.accept([5, 6])
    assert realigner.propose() is None
    realigner.keep_iterate([41, 5, 6, 42, 43])
    assert realigner.propose() == [42, 43]
    repeating = Realigner([], 0)
    repeating.accept([5, 6, 7, 8, 5, 6])
    assert repeating.propose() == [7, 8, 5, 6]
