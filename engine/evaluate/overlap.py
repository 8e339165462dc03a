"""How much of one answer is in another."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any


def similarity(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Difflib's ratio, 0 to 1, of two sequences of tokens or words: twice the length of their matching blocks, found longest
    first, over the sum of their lengths."""
    return SequenceMatcher(None, a, b, autojunk=False).ratio()


def word_similarity(a: str, b: str) -> float:
    """The same of two texts, on what stands between white space."""
    return similarity(a.split(), b.split())


def agreement(a: Sequence[int], b: Sequence[int]) -> float:
    """Share of positions, of the longer one, at which both hold the same token."""
    return sum(x == y for x, y in zip(a, b, strict=False)) / max(len(a), len(b), 1)
