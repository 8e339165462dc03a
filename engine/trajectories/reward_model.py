"""Rewards of a sequence classification model of transformers, ArmoRM's kind included."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama import modeling_llama

from engine.errors import OutOfMemory, UnsupportedModel
from engine.text import load_tokenizer
from engine.trajectories.score import Pending, Scored, ScoringFailed


class RewardModel:
    """Scores a chat of prompt and response: ``output.score`` where the model gives one, else its only logit."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, max_length: int | None
    ) -> None:
        self._model, self._tokenizer = model.eval(), tokenizer
        self._pad: int | None = tokenizer.pad_token_id
        # these models read the state of the last token that is not padding: without a pad token of its own, or with one
        # that also ends a text, that would be another token
        if self._pad is None or self._pad == tokenizer.eos_token_id:
            self._pad, batch_size = None, 1
        model.config.pad_token_id = self._pad
        self._batch_size = batch_size
        self._max_length = _longest(model, max_length)

    @classmethod
    def check(cls, folder: Path, *, device: str, trust_remote_code: bool) -> None:
        """What would keep a model from being loaded or used, as far as it shows without its weights. Raises
        UnsupportedModel, OSError, ValueError."""
        _checked_device(device)
        _checked_tokenizer(folder, trust_remote_code)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        own_class = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
        if not own_class and config.num_labels != 1:
            raise UnsupportedModel(
                f"a reward model must give one number per text, got {config.num_labels} labels of {folder}: a classifier of "
                "several labels is none"
            )

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        device: str,
        dtype: str,
        batch_size: int,
        max_length: int | None,
        trust_remote_code: bool,
    ) -> "RewardModel":
        """Raises UnsupportedModel, OSError, ValueError."""
        tokenizer, place = _checked_tokenizer(folder, trust_remote_code), _checked_device(device)
        try:
            with _what_armorm_imports():
                model, report = AutoModelForSequenceClassification.from_pretrained(
                    folder, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, output_loading_info=True
                )
        except ImportError as error:
            raise UnsupportedModel(
                f"{folder} brings code that does not run with this transformers ({error}): install what it was written for, "
                "score with it elsewhere, and give the rewards with --rewards"
            ) from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise UnsupportedModel(
                f"{folder} has no weights for {missing[:3]!s:.200}: it is no reward model of this class, and what these "
                "layers would give is random; if it brings its own class, see --trust-remote-code"
            )
        return cls(model.to(place), tokenizer, batch_size=batch_size, max_length=max_length)

    def score(self, pending: Pending) -> Scored:
        ids = [self._encode(row.chat(), response.text, response.truncated) for row, response in pending]
        fits = [i for i, tokens in enumerate(ids) if self._max_length is None or len(tokens) <= self._max_length]
        fits.sort(key=lambda i: len(ids[i]))  # less padding
        rewards: Scored = [None] * len(ids)
        for start in range(0, len(fits), self._batch_size):
            batch = fits[start : start + self._batch_size]
            for i, value in zip(batch, self._values([ids[i] for i in batch]), strict=True):
                rewards[i] = value
        return rewards

    def _values(self, batch: list[list[int]]) -> list[float]:
        """A batch that does not fit into memory goes text by text."""
        try:
            return self._forward(batch)
        except OutOfMemory as error:
            if len(batch) == 1:
                raise ScoringFailed(
                    f"one text of {len(batch[0])} tokens does not fit into memory ({error}): give a smaller --max-length "
                    "(engine.evaluate: --scorer-max-length), or a device with more"
                ) from error
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        return [value for ids in batch for value in self._values([ids])]

    @torch.inference_mode()
    def _forward(self, batch: list[list[int]]) -> list[float]:
        longest, pad = max(map(len, batch)), self._pad or 0
        input_ids = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in batch], device=self._model.device)
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch], device=self._model.device)
        try:
            output = self._model(input_ids=input_ids, attention_mask=mask)
        except ValueError as error:  # ArmoRM looks for the start of the answer in the chat, and refuses one without it
            raise ScoringFailed(f"the reward model refuses this chat: {error}") from error
        except (IndexError, RuntimeError) as error:
            if _out_of_range(error):
                raise ScoringFailed(
                    f"the reward model has no embedding for a token or position of {longest} tokens ({error}): give a smaller "
                    "--max-length (engine.evaluate: --scorer-max-length)"
                ) from error
            if not _out_of_memory(error):
                raise
            raise OutOfMemory(f"{len(batch)} texts of up to {longest} tokens: {str(error).splitlines()[0]}") from None
        score = getattr(output, "score", None)
        values = output.logits if score is None else score
        if values.numel() != len(batch):
            raise UnsupportedModel(
                f"a reward model must give one number per text, got {list(values.shape)} for {len(batch)} texts: "
                "a classifier of several labels is none"
            )
        numbers: list[float] = values.float().reshape(-1).tolist()
        return numbers

    def _encode(self, chat: list[dict[str, str]], text: str, truncated: bool) -> list[int]:
        tokenizer = self._tokenizer
        if not tokenizer.chat_template:
            if len(chat) > 1:
                raise ScoringFailed("the reward model has no chat template: it can score single prompts only")
            pair: list[int] = tokenizer(chat[0]["content"], text)["input_ids"]
            return pair
        turns: list[dict[str, Any]] = [*chat, {"role": "assistant", "content": text}]
        try:
            rendered = tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=truncated)
        except Exception as error:  # the checkpoint's own template refuses chats in its own words
            raise ScoringFailed(f"the reward model's chat template refuses this chat: {error}") from error
        # the rendered text already has its special tokens
        ids: list[int] = tokenizer(str(rendered), add_special_tokens=False)["input_ids"]
        return ids


def _longest(model: PreTrainedModel, wanted: int | None) -> int | None:
    """Tokens that a text may have: as ``wanted``, else as configured; never more than a table of positions has. RoBERTa and its
    kin count theirs from behind the padding's index on."""
    configured = getattr(model.config, "max_position_embeddings", None)
    limit = wanted or (configured if isinstance(configured, int) else None)
    limits = [] if limit is None else [limit]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    return min(limits, default=None)


def _out_of_range(error: RuntimeError | IndexError) -> bool:
    return isinstance(error, IndexError) or "out of bounds" in str(error)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error).lower() for text in ("out of memory", "can't allocate memory")
    )


def _checked_device(device: str) -> torch.device:
    """Raises ValueError."""
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"the reward model's device {device!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from error
    return place


def _checked_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Raises UnsupportedModel."""
    tokenizer = load_tokenizer(folder, trust_remote_code)
    if tokenizer is None:
        raise UnsupportedModel(f"{folder} holds no tokenizer: a reward model needs its own")
    return tokenizer


@contextmanager
def _what_armorm_imports() -> Iterator[None]:
    """ArmoRM's published code imports the text of a docstring that transformers 5 has no more: here it is, empty."""
    name = "LLAMA_INPUTS_DOCSTRING"
    if hasattr(modeling_llama, name):
        yield
        return
    setattr(modeling_llama, name, "")
    try:
        yield
    finally:
        delattr(modeling_llama, name)
