"""Re-alignment: where in the draft, or in earlier iterates, the answer goes on.

After an insertion or deletion the rest of a draft is right but at shifted positions. The newly accepted tokens are looked
up in the draft and what followed them there becomes the next guess. Guesses never change a result, only its cost.
"""

from collections import defaultdict

from engine.kernels.jacobi_state import LONGEST_MATCH, NEARBY


class Source:
    """A token sequence that can be searched by its pairs of neighbours."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens: list[int] = []
        self._after_pair: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        """Appends tokens; the pair that joins old and new is found too."""
        start = len(self.tokens)
        self.tokens.extend(tokens)
        for i in range(max(1, start), len(self.tokens)):
            self._after_pair[self.tokens[i - 1], self.tokens[i]].append(i + 1)

    def after(self, context: list[int], expected: int | None, before: int) -> int | None:
        """Where the longest match of the end of ``context`` ends, below ``before``; of equally long ones the nearest to
        ``expected``, or the last. None where not even two tokens match."""
        if len(context) < 2:
            return None
        best: tuple[int, int] | None = None
        found = None
        # the latest few: a frequent pair in a long text must not make a step expensive
        for place in self._after_pair.get((context[-2], context[-1]), ())[-32:]:
            if place >= before:
                continue
            distance = -place if expected is None else abs(place - expected)
            score = (self._match_length(context, place), -distance)
            if best is None or score > best:
                best, found = score, place
        return found

    def _match_length(self, context: list[int], place: int) -> int:
        most = min(LONGEST_MATCH, place, len(context))
        return next((n for n in range(2, most) if self.tokens[place - 1 - n] != context[-1 - n]), most)


class Realigner:
    """Keeps the places where an answer may go on; one per sequence."""

    def __init__(self, draft: list[int], kept: int) -> None:
        self._draft = Source(draft)
        self._answer = Source(draft[:kept])
        self._iterate = Source([])
        self._place = kept

    def accept(self, tokens: list[int]) -> None:
        """Records newly final tokens; until a match says otherwise each is taken to stand for one of the draft's."""
        self._answer.extend(tokens)
        self._place += len(tokens)

    def keep_iterate(self, tokens: list[int]) -> None:
        """Keeps the part of an iterate that is being replaced: it may turn out right at a shifted position."""
        if len(tokens) > 1:
            self._iterate = Source(tokens)

    def propose(self) -> list[int] | None:
        """What follows the answer's last tokens in the draft, else in the last iterate, else in the answer itself."""
        context = self._answer.tokens[-LONGEST_MATCH - 1 :]
        place = self._draft.after(context, self._place, len(self._draft.tokens))
        if place is None:
            place = self._nearby(context[-1])
        if place is not None:
            self._place = place
            return self._draft.tokens[place:]
        for source in (self._iterate, self._answer):
            place = source.after(context, None, len(source.tokens))
            if place is not None:
                return source.tokens[place:]
        return None

    def _nearby(self, token: int) -> int | None:
        tokens = self._draft.tokens
        for distance in range(NEARBY + 1):
            for place in (self._place + distance, self._place - distance):
                if 0 < place < len(tokens) and tokens[place - 1] == token:
                    return place
        return None
