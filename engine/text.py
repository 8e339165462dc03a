"""From a request's text to the refiner's tokens and back: its own chat template, tokenised once."""

import copy
import functools
import logging
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engine.errors import InvalidRequest
from engine.jacobi import Vocabulary
from engine.request import Request

logger = logging.getLogger("engine.text")

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def load_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, None where it holds none."""
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    # its own limit only has it warn of long texts, in the midst of a progress bar; what does not fit, requests are told
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def tokens_behind_answer(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the chat template puts behind an assistant's answer; nothing where it has no such turns."""
    if not tokenizer.chat_template:
        return []
    mark = "answer"
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception as error:  # as in _render; such a template does not say how a turn ends
        logger.info("the chat template refuses an assistant's turn: %s", error)
        return []
    _, found, after = text.rpartition(mark)
    ids: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
    return ids


class TextCodec:
    """Turns requests into prompt and draft ids, and answers into text; for any number of threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocabulary: Vocabulary) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self._lock = threading.Lock()  # a tokenizer sets its own state when it is called

    def encode(self, request: Request, condition: str | None, keep_prefix: int = 0) -> tuple[list[int], list[int]]:
        """Prompt ids, draft ids; with a ``condition`` template the draft is also part of the prompt.

        A draft as text gets the end of the turn behind it, unless ``keep_prefix`` would keep that as well.
        """
        # what is in token ids already does not wait for somebody else's long text
        ready = request.prompt_ids is not None and not request.draft
        lock: AbstractContextManager[object] = nullcontext() if ready else self._lock
        with lock:
            prompt, draft = self._encode(request, condition, keep_prefix)
        self._check_range("prompt_ids", prompt)
        self._check_range("draft_ids", draft)
        return prompt, draft

    def _encode(self, request: Request, condition: str | None, keep_prefix: int) -> tuple[list[int], list[int]]:
        if request.prompt_ids is not None:
            if condition is not None:
                raise InvalidRequest("the condition option needs text: got prompt_ids; pass prompt or messages")
            prompt_text, prompt = None, list(request.prompt_ids)
        else:
            messages = self._messages(request, condition)
            if self._need_tokenizer().chat_template:
                prompt_text = self._render(messages)
                prompt = self._tokenize(prompt_text)
            else:
                prompt_text, prompt = None, self._plain_prompt(messages)
        if request.draft_ids is not None:
            draft = list(request.draft_ids)
        else:
            draft = self._draft(request.draft or "", prompt_text, prompt)
            if len(draft) > keep_prefix:
                draft = draft + self._end_of_turn
        return prompt, draft

    def copy(self) -> "TextCodec":
        """One with a tokenizer of its own, whose ``decode`` never waits for a text that is encoded here."""
        return TextCodec(copy.deepcopy(self.tokenizer), self.vocabulary)

    def decode(self, token_ids: list[int]) -> str | None:
        """The text of an answer, without special tokens; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        with self._lock:
            text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _messages(self, request: Request, condition: str | None) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = list(request.messages or [{"role": "user", "content": request.prompt or ""}])
        if condition is None:
            return messages
        if request.draft is None:
            raise InvalidRequest("the condition option needs a draft as text: pass draft, or leave condition out")
        # only the two fields are replaced: braces in the texts themselves are text
        content = condition.format(prompt=messages[-1]["content"], draft=request.draft)
        return [*messages[:-1], {"role": "user", "content": content}]

    def _render(self, messages: list[dict[str, Any]]) -> str:
        try:
            rendered = self._need_tokenizer().apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # the template is the checkpoint's own code and refuses chats in its own words
            raise InvalidRequest(f"the refiner's chat template refuses this chat: {error}") from error
        assert isinstance(rendered, str)
        return rendered

    def _plain_prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """A prompt for a refiner without a chat template, with the special tokens its tokenizer puts around a text."""
        if len(messages) > 1:
            raise InvalidRequest("the refiner has no chat template: pass a single prompt, or prompt_ids")
        ids: list[int] = self._need_tokenizer()(str(messages[0]["content"]))["input_ids"]
        while ids and ids[-1] in self.vocabulary.eos:
            ids.pop()
        if not ids:
            raise InvalidRequest("the prompt has no tokens in the refiner's vocabulary")
        return ids

    def _tokenize(self, text: str) -> list[int]:
        # the rendered text already has the BOS: adding special tokens would give a second one
        ids: list[int] = self._need_tokenizer()(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise InvalidRequest("the prompt has no tokens in the refiner's vocabulary")
        return ids

    def _draft(self, draft: str, prompt_text: str | None, prompt: list[int]) -> list[int]:
        draft = draft.strip()
        if not draft:
            return []
        if prompt_text is None:
            ids: list[int] = self._need_tokenizer()(draft, add_special_tokens=False)["input_ids"]
        else:
            # tokenised behind the prompt, as in training: a tokenizer may treat the start of a text differently
            ids = self._tokenize(prompt_text + draft)
            if ids[: len(prompt)] == prompt:
                ids = ids[len(prompt) :]
            else:
                ids = self._tokenize(draft)
        return ids

    @functools.cached_property
    def _end_of_turn(self) -> list[int]:
        """The EOS token that ends an assistant's turn in the template; Gemma's, for one, is not the tokenizer's own EOS."""
        tokenizer = self._need_tokenizer()
        candidates = [*tokens_behind_answer(tokenizer), tokenizer.eos_token_id]
        return [token for token in candidates if token in self.vocabulary.eos][:1]

    def _need_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise InvalidRequest("the refiner was loaded without a tokenizer: pass prompt_ids and draft_ids")
        return self.tokenizer

    def _check_range(self, name: str, ids: list[int]) -> None:
        bad = next((token for token in ids if not 0 <= token < self.vocabulary.size), None)
        if bad is not None:
            raise InvalidRequest(f"{name} must be in 0 .. {self.vocabulary.size - 1}, got {bad}")
