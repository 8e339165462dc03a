"""Jacobi decoding of one sequence: what it feeds next and what it learns from the predictions. No tensors here.

The response is a final prefix followed by guesses. A step feeds the tokens whose K/V is not valid yet, then guesses; row i
predicts the token behind it. Predictions are final up to and including the first one that differs from the guess fed behind
it; K/V is valid below that one, so the next step starts there and simply overwrites.
"""

from dataclasses import dataclass

from engine.batch import Feed
from engine.errors import EngineError, NonFiniteLogits
from engine.options import RefineOptions
from engine.realign import Realigner
from engine.request import FinishReason
from engine.window import WindowPolicy


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The token ids the loop itself needs."""

    size: int
    eos: frozenset[int]
    pad: int
    """Fills positions for which there is no guess yet."""


class JacobiSequence:
    """State of one request between steps. ``plan`` and ``advance`` alternate until ``finish_reason`` is set."""

    def __init__(
        self, prompt: list[int], draft: list[int], options: RefineOptions, vocabulary: Vocabulary, knee: int, seed: int
    ) -> None:
        self.prompt = prompt
        self.options = options
        self.vocabulary = vocabulary
        self.seed = seed
        self.pages: list[int] = []
        self.observed = False
        """Whether ``final``, ``tentative`` and ``steps`` are looked at before the end."""
        self._draft = draft[: options.max_new_tokens]
        self._knee = knee
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forgets what was done; what is planned next starts at prompt and draft. The pages stay."""
        options, draft = self.options, self._draft
        self.steps = 0
        self.forward_tokens = 0
        self.converged = True
        self.finish_reason: FinishReason | None = None
        self.error: EngineError | None = None
        kept = min(options.keep_prefix, len(draft))
        self.final = draft[:kept]
        self._guess = draft[kept:]
        self._searched = 0  # final tokens known to hold no EOS
        self._valid = 0  # positions whose K/V is that of final tokens
        self.policy = WindowPolicy(self._knee)
        self._realigner = Realigner(draft, kept) if options.realign and options.steps is None else None
        self._block_end = min(options.block_size, options.max_new_tokens)
        self._block_steps = 0
        self._planned = 0  # guesses of the step under way
        self._fed: list[int] = []  # tokens of that step already fed, when it takes several forward passes
        self._predicted: list[int] = []
        self._finish_if_complete()

    @property
    def longest(self) -> int:
        """Most positions this sequence can occupy."""
        return len(self.prompt) + self.options.max_new_tokens

    @property
    def tentative(self) -> list[int]:
        """The guess behind ``final``, as far as it would be returned if it were right."""
        guess = self._guess[: self.options.max_new_tokens - len(self.final)]
        end = next((i + 1 for i, token in enumerate(guess) if token in self.vocabulary.eos), len(guess))
        return guess[:end]

    @property
    def guess(self) -> list[int]:
        """What is taken to follow ``final``."""
        return list(self._guess)

    @property
    def block_end(self) -> int:
        """With ``steps``: where the block under way ends."""
        return self._block_end

    def plan_prefill(self, budget: int) -> Feed | None:
        """Rows of the certain tokens but the last, which predicts; None where they are all in the cache."""
        last = len(self.prompt) + len(self.final) - 1
        tokens = self._certain(self._valid, min(last, self._valid + budget))
        return Feed(tokens, self._valid, self.pages, len(tokens)) if tokens else None

    def plan(self, budget: int, sequences: int) -> Feed:
        """The next rows to feed, at most ``budget`` (>= 1) of them."""
        known = len(self.prompt) + len(self.final)
        position = self._valid + len(self._fed)
        if position < known and known - position > budget:  # part of a prompt: nothing to predict yet
            tokens = self._certain(position, position + budget)
            return Feed(tokens, position, self.pages, len(tokens))
        if not self._fed:
            room = budget - (known - position)
            if self.options.concurrency is not None:
                # what is planned may not depend on the others: it is fed in several passes if it must
                room, sequences = self.longest, self.options.concurrency
            self._planned = self._fill_guess(self._wanted(room, sequences))
        tokens = self._certain(position, known) + self._guess[max(0, position - known) : self._planned]
        tokens = tokens[:budget]
        return Feed(tokens, position, self.pages, max(0, known - 1 - position))

    def advance(self, feed: Feed, predictions: list[int]) -> None:
        """Takes the predictions of the rows from ``feed.logit_start`` on."""
        self.forward_tokens += len(feed.tokens)
        if feed.logit_start == len(feed.tokens):
            self._valid += len(feed.tokens)
            return
        self._fed += feed.tokens
        self._predicted += predictions
        known = len(self.prompt) + len(self.final)
        if self._valid + len(self._fed) < known + self._planned:
            return
        self.steps += 1
        self._accept(self._predicted)
        self._fed, self._predicted = [], []

    def show(self, final: list[int], guess: list[int]) -> None:
        """Has the iterate that the device loop came to, for those who look at it; it can ``plan`` again after
        ``begin_anew`` only."""
        self.final, self._guess = final, guess

    def fail(self, error: EngineError) -> None:
        """Ends the sequence with an error."""
        self.error = error
        self.finish_reason = "error"

    def fail_at_nan(self) -> None:
        """Ends the sequence because the row behind its final tokens is NaN."""
        at = len(self.final)
        self.fail(NonFiniteLogits(f"the model's logits are NaN at response position {at}: check weights and dtype"))

    def _certain(self, start: int, stop: int) -> list[int]:
        """Prompt and final tokens at positions start .. stop."""
        p = len(self.prompt)
        return self.prompt[start:stop] + self.final[max(0, start - p) : max(0, stop - p)]

    def _wanted(self, room: int, sequences: int) -> int:
        """How many guesses to feed; the last position of the answer is predicted, never fed."""
        if self.options.steps is not None:
            return self._block_end - len(self.final) - 1  # a step moves the whole block, in several passes if it must
        left = self.options.max_new_tokens - len(self.final) - 1
        if self.options.window == "auto":
            return self.policy.guesses(min(left, room, len(self._guess)), sequences)
        return min(left, room, self.options.window - 1)

    def _fill_guess(self, wanted: int) -> int:
        self._guess += [self.vocabulary.pad] * (wanted - len(self._guess))
        return wanted

    def _accept(self, predicted: list[int]) -> None:
        """predicted[i] stands behind i guesses that were fed; the first is final."""
        if -1 in predicted:
            predicted = self._without_nan(predicted)
            if self.finish_reason:
                return
        matched = 0
        while matched < self._planned and self._guess[matched] == predicted[matched]:
            matched += 1
        self._valid = len(self.prompt) + len(self.final) + matched
        fresh = predicted[: matched + 1]
        # beyond the rows fed one more guess can be checked: the one at the position just predicted
        aligned = matched < len(self._guess) and self._guess[matched] == predicted[matched]
        if matched < len(self._guess):
            self.policy.observe(matched + aligned, not aligned)
        else:
            self.policy.observe(matched, False)
        tail, rest = predicted[matched + 1 :], self._guess[self._planned + 1 :]
        self.final += fresh
        self._guess = tail + rest
        if self._realigner:
            self._realigner.accept(fresh)
            if not aligned:
                self._realign(self._realigner, tail)
        self._block_steps += 1
        self._finish_if_complete()

    def _without_nan(self, predicted: list[int]) -> list[int]:
        """-1 stands for a row of NaN: an error where it would be final, of no account in a guess."""
        right = 0
        while right < self._planned and self._guess[right] == predicted[right]:
            right += 1
        if -1 in predicted[: right + 1]:
            self.final += predicted[:right]
            self.fail_at_nan()
        return [max(token, 0) for token in predicted]

    def _realign(self, realigner: Realigner, tail: list[int]) -> None:
        proposal = realigner.propose()
        realigner.keep_iterate(tail)
        self.policy.in_run = False
        if proposal:
            self._guess = proposal + self._guess[len(proposal) :]

    def _finish_if_complete(self) -> None:
        limit = self.options.max_new_tokens
        if self._cut_at_eos():
            self.finish_reason = "eos"
        elif len(self.final) >= limit:
            del self.final[limit:]
            self.finish_reason = "length"
        elif self.options.steps is not None:
            self._end_block(self.options.steps)

    def _cut_at_eos(self) -> bool:
        eos = self.vocabulary.eos
        for i in range(self._searched, len(self.final)):
            if self.final[i] in eos:
                del self.final[i + 1 :]
                return True
        self._searched = len(self.final)
        return False

    def _end_block(self, steps: int) -> None:
        missing = self._block_end - len(self.final)
        if missing > 0:
            if self._block_steps < steps:
                return
            # out of steps: the rest of the iterate becomes the answer as it is
            self.converged = False
            self.final += self._guess[:missing]
            del self._guess[:missing]
            if self._cut_at_eos() or len(self.final) == self.options.max_new_tokens:
                self.finish_reason = "steps"
                return
        while self._block_end <= len(self.final):
            self._block_end = min(self._block_end + self.options.block_size, self.options.max_new_tokens)
        self._block_steps = 0
