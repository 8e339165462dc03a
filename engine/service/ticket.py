"""One request on its way: what its reader and the engine's thread share."""

from dataclasses import dataclass, field

from engine.errors import EngineError
from engine.jacobi import JacobiSequence
from engine.options import RefineOptions
from engine.request import Request, Result
from engine.service.mailbox import Mailbox
from engine.text import TextCodec


@dataclass(frozen=True, slots=True, kw_only=True)
class Iterate:
    """An answer as it stands after a step: its beginning is final, the rest a guess that later steps may change."""

    step: int
    """Jacobi steps so far. An update of the weights begins the answer anew, at step 1; on a GPU a failed step may, too."""
    token_ids: list[int]
    """The whole iterate."""
    converged_tokens: int
    """How many of them, from the first on, are final."""
    converged_text: str | None
    """The final beginning as text, without a character that is not complete yet; None without a tokenizer."""
    tentative_text: str | None
    """What the iterate as text has behind ``converged_text``."""
    result: Result | None
    """The answer, with the last iterate."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What the engine's thread tells of a request that goes on."""

    step: int
    final: list[int]
    tentative: list[int]


@dataclass(frozen=True, slots=True)
class Finished:
    """The request ended without an error; its sequence is not touched any more."""

    seconds: float


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket:
    """A request that was let in. ``sequence`` and what follows it belong to the engine's thread until the request has ended."""

    request: Request
    options: RefineOptions
    number: int
    priority: int
    entered: float
    deadline: float | None
    """On the clock of ``entered``."""
    streamed: bool
    mailbox: Mailbox[Progress | Finished] = field(default_factory=Mailbox)
    sequence: JacobiSequence
    started: float | None = None
    ended: bool = False
    told: int = 0
    """The step last told to the reader."""

    def __post_init__(self) -> None:
        self.sequence.observed = self.streamed

    def begin_anew(self) -> None:
        """Forgets the answer so far; what was encoded on entry is kept, whatever has become of the caller's lists."""
        self.sequence.begin_anew()
        self.told = 0

    @property
    def tokens(self) -> int:
        """Most positions that prompt and answer take in the KV cache."""
        return self.sequence.longest

    def tell(self) -> None:
        """Leaves the present iterate for the reader, if there is a new one."""
        steps = self.sequence.steps
        if not self.streamed or steps == self.told:
            return
        self.told = steps
        if steps:  # one that begins anew has none
            self.mailbox.put(Progress(self.told, list(self.sequence.final), self.sequence.tentative))

    def end(self, outcome: Finished | EngineError) -> None:
        self.ended = True
        self.mailbox.put(outcome)

    def result(self, finished: Finished, codec: TextCodec) -> Result:
        sequence, reason = self.sequence, self.sequence.finish_reason
        assert reason is not None
        return Result(
            id=self.number if self.request.id is None else self.request.id,
            index=self.number,
            text=codec.decode(sequence.final),
            token_ids=sequence.final,
            steps=sequence.steps,
            converged=sequence.converged,
            forward_tokens=sequence.forward_tokens,
            finish_reason=reason,
            seconds=finished.seconds,
            metadata=self.request.metadata,
        )

    def iterate(self, news: Progress | Finished, codec: TextCodec) -> Iterate:
        """The event that ``news`` becomes for the reader."""
        if isinstance(news, Finished):
            result = self.result(news, codec)
            return Iterate(
                step=result.steps, token_ids=result.token_ids, converged_tokens=len(result.token_ids),
                converged_text=result.text, tentative_text=None if result.text is None else "", result=result,
            )  # fmt: skip
        tokens = news.final + news.tentative
        converged, tentative = _split(codec.decode(news.final), codec.decode(tokens))
        return Iterate(
            step=news.step, token_ids=tokens, converged_tokens=len(news.final), converged_text=converged,
            tentative_text=tentative, result=None,
        )  # fmt: skip


def _split(final: str | None, whole: str | None) -> tuple[str | None, str | None]:
    """``whole`` as the part that ``final`` tokens settle and the rest."""
    if final is None or whole is None:
        return None, None
    # tokens may end inside a character, which decodes to U+FFFD until the rest of it is there
    final = final.rstrip("\ufffd")
    length = next(
        (i for i, (a, b) in enumerate(zip(final, whole, strict=False)) if a != b), min(len(final), len(whole))
    )
    return whole[:length], whole[length:]
