"""What every peer takes and gives, and what its answers cost."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from engine.request import Request
from engine.text import TextCodec


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What an answer took. Seconds are wall-clock time that its request waited, from the moment its batch was handed over:
    of a part that works on a batch as a whole each request waits all of it."""

    draft: float = 0.0
    """Seconds of making drafts, samples, or an answer under guidance."""
    refinement: float = 0.0
    """Seconds of the refiner."""
    reward: float = 0.0
    """Seconds of the reward model, where it takes part in answering."""
    token_forwards: int = 0
    """Positions fed through language models for this answer, prompt, draft and padding included."""
    sequential_steps: int = 0
    """Forward passes that had to wait for one another, those of the reward model included."""
    reward_tokens: int = 0
    """Positions fed through the reward model for this answer."""

    @property
    def seconds(self) -> float:
        """From the request to its answer."""
        return self.draft + self.refinement + self.reward


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer of at most the peer's limit of tokens."""

    token_ids: list[int]
    """In the tokens of the model that gave it, ending with EOS where there was one."""
    text: str | None
    """Without special tokens; None without a tokenizer."""
    ended: bool = True
    """Whether it ended by itself, and not at the limit."""
    cost: Cost


def answer_in(codec: TextCodec, token_ids: list[int], cost: Cost) -> Answer:
    """An answer in a model's tokens, with its text."""
    ended = bool(token_ids) and token_ids[-1] in codec.vocabulary.eos
    return Answer(token_ids=token_ids, text=codec.decode(token_ids), ended=ended, cost=cost)


class Peer(Protocol):
    """A way to answer. It holds models, options and the limit of tokens; ``answer`` may be called again and again."""

    takes_draft: bool
    """Whether it works on the base model's drafts; then their cost is part of its answers'."""
    largest_batch: int | None
    """Requests it takes at a time; None: any number."""

    def answer(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> list[Answer]:
        """Answers in the order of the requests; ``drafts`` are the base model's, one each."""
        ...


def with_draft(request: Request, draft: Answer) -> Request:
    """The request with a draft in the form in which it has its prompt: as text, or as token ids."""
    if request.prompt_ids is None:
        return replace(request, draft=draft.text)
    return replace(request, draft_ids=draft.token_ids)


def behind_drafts(drafts: Sequence[Answer], index: int) -> Cost:
    """What the ``index``-th request has cost when all drafts of its batch are there."""
    own = drafts[index].cost
    return Cost(
        draft=max(draft.cost.seconds for draft in drafts),
        token_forwards=own.token_forwards,
        sequential_steps=own.sequential_steps,
    )
