"""What goes into the engine and what comes out."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from engine.errors import EngineError, InvalidRequest

FinishReason = Literal["eos", "length", "steps", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer to refine: exactly one of ``prompt``, ``messages``, ``prompt_ids``; at most one form of draft."""

    prompt: str | None = None
    """The user's text; goes through the refiner's chat template."""
    messages: list[dict[str, str]] | None = None
    """A chat that ends with the user's turn: [{"role": ..., "content": ...}, ...]."""
    prompt_ids: list[int] | None = None
    """Token ids of the refiner's own tokenizer, fed as they are."""
    draft: str | None = None
    """The draft answer as text; any model's."""
    draft_ids: list[int] | None = None
    """The draft in the refiner's token ids."""
    id: str | int | None = None
    """Comes back with the result."""
    seed: int | None = None
    """Overrides RefineOptions.seed for this request."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Comes back with the result."""

    def __post_init__(self) -> None:
        given = [name for name in ("prompt", "messages", "prompt_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequest(
                f"a request needs exactly one of prompt, messages and prompt_ids, got {given or 'none of them'}"
            )
        if self.draft is not None and self.draft_ids is not None:
            raise InvalidRequest("a request takes draft or draft_ids, got both: leave one out")
        _check_text("prompt", self.prompt)
        _check_text("draft", self.draft, may_be_empty=True)
        _check_ids("prompt_ids", self.prompt_ids)
        _check_ids("draft_ids", self.draft_ids, may_be_empty=True)
        if self.messages is not None:
            _check_messages(self.messages)
        if self.id is not None and (not isinstance(self.id, str | int) or isinstance(self.id, bool)):
            raise InvalidRequest(f"id must be a string or an integer, got {type(self.id).__name__}")
        seed = 0 if self.seed is None else self.seed
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise InvalidRequest(f"seed must be an integer in 0 .. 2**63 - 1, got {self.seed!r}")
        if not isinstance(self.metadata, dict):
            raise InvalidRequest(f"metadata must be a dict, got {type(self.metadata).__name__}")

    @classmethod
    def parse(cls, value: "Request | Mapping[str, Any]") -> "Request":
        """A Request from a mapping with the same field names; unknown names are refused."""
        if isinstance(value, Request):
            return value
        if not isinstance(value, Mapping):
            raise InvalidRequest(f"a request must be a dict or a Request, got {type(value).__name__}")
        known = {f.name for f in fields(cls)}
        unknown = sorted(str(name) for name in value if name not in known)
        if unknown:
            raise InvalidRequest(
                f"unknown request fields {unknown}; known are {sorted(known)} (other data belongs in metadata)"
            )
        return cls(**value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The refined answer of one request, or the error that ended it."""

    id: str | int | None
    """The request's id; its position in the input where it had none."""
    index: int
    """Position in the input."""
    text: str | None = None
    """Decoded answer without special tokens; None without a tokenizer."""
    token_ids: list[int] = field(default_factory=list)
    """The answer's tokens, ending with EOS where there was one."""
    steps: int = 0
    """Jacobi steps: forward passes that moved this answer. They and ``forward_tokens`` depend on what else runs, unless
    RefineOptions.concurrency fixes what is reckoned with; the answer does not."""
    converged: bool = False
    """Whether the answer is the fixed point: what decoding token by token gives."""
    forward_tokens: int = 0
    """Token positions fed through the model for this request, the prompt included."""
    finish_reason: FinishReason = "error"
    """"eos", "length" (max_new_tokens reached), "steps" (returned before it had converged) or "error"."""
    seconds: float = field(default=0.0, compare=False)
    """From the request's entry, the wait for a place in the batch included, to its end."""
    error: EngineError | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def _check_text(name: str, value: object, *, may_be_empty: bool = False) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a string, got {type(value).__name__}")
    if not value and not may_be_empty:
        raise InvalidRequest(f"{name} is empty: give the text to answer")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{name} is not valid Unicode text: {error}") from None


def _check_ids(name: str, value: object, *, may_be_empty: bool = False) -> None:
    if value is None:
        return
    if not isinstance(value, list | tuple):
        raise InvalidRequest(f"{name} must be a list of integers, got {type(value).__name__}")
    if not value and not may_be_empty:
        raise InvalidRequest(f"{name} is empty: it needs at least one token")
    for token in value:
        if not isinstance(token, int) or isinstance(token, bool):
            raise InvalidRequest(f"{name} must hold integers, got {token!r:.80} ({type(token).__name__})")


def _describe(value: object) -> str:
    """What was got, in a few words whatever its size and depth."""
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {sorted(map(str, value))[:5]!s:.200}"
    return f"{type(value).__name__}" + (f" of length {len(value)}" if isinstance(value, list | tuple | str) else "")


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidRequest(f"messages must be a non-empty list of chat turns, got {_describe(messages)}")
    for turn in messages:
        if not isinstance(turn, Mapping) or set(turn) != {"role", "content"}:
            raise InvalidRequest(f'a message must be {{"role": ..., "content": ...}}, got {_describe(turn)}')
        _check_text("a message's role", turn["role"])
        _check_text("a message's content", turn["content"], may_be_empty=turn["role"] != "user")
    if messages[-1]["role"] != "user":
        raise InvalidRequest(
            f"messages must end with the user's turn (the answer belongs in draft), got role {messages[-1]['role']!r:.80}"
        )
