"""Whether answers are text: nats per token under the base model, and those of real models' answers to hold them against."""

from collections.abc import Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from bench.reproduction.data import Fields
from bench.reproduction.paper.answers import REAL
from bench.reproduction.paper.data import cut_row
from bench.reproduction.paper.measure import real_answers


class Reader(Protocol):
    """Says how likely texts are, as ``bench.reproduction.paper.measure.Fluency`` does."""

    def nats(self, prompt: str, text: str) -> float | None:
        """Per token of the text behind the prompt; None for an empty one."""
        ...


def of_real_answers(
    rows: Sequence[Fields], reader: Reader, tokenizer: PreTrainedTokenizerBase, tokens: int
) -> dict[str, dict[str, list[Any]]]:
    """Of the real models in the data, nats per token of their answers to its rows, cut at as many tokens as peers get.
    Models that did not answer all rows are left out."""
    found = {}
    for model in REAL:
        if all(any(response["model"] == model for response in row.get("responses", ())) for row in rows):
            answers = real_answers([cut_row(row, tokens, tokenizer) for row in rows], model)
            nats = [reader.nats(row["prompt"], answer["text"]) for row, answer in zip(rows, answers, strict=True)]
            found[model] = {"prompt": list(range(len(rows))), "nats": nats}
    return found
