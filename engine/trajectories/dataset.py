"""From a trajectory file to what ``engine.training`` takes: token ids in the model's own chat template."""

import logging
import sys
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

from engine.errors import InvalidRequest
from engine.request import Request
from engine.trajectories.schema import BadRow, Response, TrajectoryRow, read_rows, without_repeats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from engine.text import TextCodec
    from engine.training.layout import Trajectory

logger = logging.getLogger("engine.trajectories")


def load(
    path: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    eos_ids: Collection[int] | None = None,
    on_bad: Callable[[BadRow], None] | None = None,
) -> "Iterator[Trajectory]":
    """The trajectories of a file, tokenised: each answer behind its prompt, with the end of its turn unless it was cut.

    ``eos_ids``: what ends an answer, those of the model's generation config; None: the tokenizer's EOS and the special
    tokens that the chat template puts behind an answer. Rewards are passed on as they are, missing ones as None, so that
    ``engine.training.rank`` decides. A row that cannot be used is given to ``on_bad`` (None: logged as a warning), and the
    next one follows. Raises OSError, ValueError.
    """
    from engine.jacobi import Vocabulary
    from engine.text import TextCodec

    ends = frozenset(turn_ends(tokenizer) if eos_ids is None else eos_ids)
    codec = TextCodec(tokenizer, Vocabulary(len(tokenizer), ends, min(ends, default=0)))
    for number, row in enumerate(read_rows(path)):
        try:
            if isinstance(row, BadRow):
                raise InvalidRequest(row.error)
            yield _tokenised(codec, without_repeats(row))
        except InvalidRequest as error:
            bad = BadRow(path, number, str(error))
            if on_bad:
                on_bad(bad)
            else:
                logger.warning("left out: %s", bad)


def turn_ends(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The tokenizer's EOS and the special tokens that its chat template puts behind an answer."""
    from engine.text import tokens_behind_answer

    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= {token for token in tokenizer.all_special_ids if isinstance(token, int)}
    ends = {token for token in tokens_behind_answer(tokenizer) if token in special}
    if isinstance(tokenizer.eos_token_id, int):
        ends.add(tokenizer.eos_token_id)
    return ends


def _tokenised(codec: "TextCodec", row: TrajectoryRow) -> "Trajectory":
    from engine.training.layout import Trajectory

    prompt, _ = codec.encode(Request(messages=row.chat()), None)
    return Trajectory(
        id=row.prompt_id,
        prompt_ids=prompt,
        responses=[_response_ids(codec, row, response) for response in row.responses],
        rewards=[response.reward for response in row.responses],
    )


def _response_ids(codec: "TextCodec", row: TrajectoryRow, response: Response) -> list[int]:
    if not response.text.strip():
        return []
    # a kept prefix of any length has no end of turn behind it
    keep = sys.maxsize if response.truncated else 0
    return codec.encode(Request(messages=row.chat(), draft=response.text), None, keep)[1]
