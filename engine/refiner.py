"""The public API: load a refiner, refine many answers at once, close it."""

import logging
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from engine.device_loop import choose_loop
from engine.errors import EngineDead, InvalidRequest, RequestTooLong, UnsupportedModel
from engine.jacobi import JacobiSequence, Vocabulary
from engine.kernels import PAGE_SIZE
from engine.kv_cache import pages_for
from engine.model import CausalModel, Decoder
from engine.options import RefineOptions
from engine.request import Request, Result
from engine.scheduler import Scheduler
from engine.session import RequestLike, Session
from engine.text import TextCodec, load_tokenizer
from engine.weights import resolve_checkpoint
from engine.window import knee_rows

logger = logging.getLogger("engine.refiner")

DEFAULT_CHECKPOINT = Path(__file__).parent / "refiner_checkpoint"
"""The small refiner that ships with the package."""

RESULTS_HELD = 16
"""Finished results kept back for the sake of their order, in batches of ``max_batch_size``."""

Backend = Literal["auto", "lean", "hf"]


class Refiner:
    """A refiner model with its KV cache.

    ``refine`` and ``stream`` may be called from several threads and several streams may be open at once: their requests
    share the batch. Close it, or use it in a ``with`` block, to free the weights and the cache.
    """

    def __init__(
        self,
        model: CausalModel,
        vocabulary: Vocabulary,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_batch_tokens: int = 2048,
        kv_cache_tokens: int = 16384,
        max_batch_size: int = 64,
    ) -> None:
        """``max_batch_tokens``: rows of one forward pass; ``kv_cache_tokens``: positions the KV pool holds, rounded up to
        pages of 32; ``max_batch_size``: sequences that run at once."""
        for name, value in (
            ("max_batch_tokens", max_batch_tokens),
            ("kv_cache_tokens", kv_cache_tokens),
            ("max_batch_size", max_batch_size),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        self._codec = TextCodec(tokenizer, vocabulary)
        # before there is a cache, which may take what memory is left
        self._knee = knee_rows(model.device, model.head.weight.data.dtype)
        cache = model.new_cache(pages_for(kv_cache_tokens))
        loop = choose_loop(model, cache, vocabulary, self._knee, max_batch_tokens, max_batch_size)
        self._scheduler: Scheduler | None = Scheduler(model, cache, max_batch_tokens, max_batch_size, loop)
        self._lock = threading.Lock()
        self._abandoned: deque[JacobiSequence] = deque()  # appended to without the lock

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path | None = None,
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        max_batch_tokens: int = 2048,
        kv_cache_tokens: int = 16384,
        max_batch_size: int = 64,
        backend: Backend = "auto",
        trust_remote_code: bool = False,
    ) -> "Refiner":
        """Loads a checkpoint folder or hub id (default: the refiner that ships).

        ``backend="lean"`` is the engine's own decoder, ``"hf"`` runs the transformers modules; "auto" takes the lean one
        where it supports the model. Raises UnsupportedModel, FileNotFoundError or ValueError.
        """
        folder = resolve_checkpoint(path_or_hub_id if path_or_hub_id is not None else DEFAULT_CHECKPOINT)
        if backend not in ("auto", "lean", "hf"):
            raise ValueError(f'backend must be "auto", "lean" or "hf", got {backend!r}')
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("cpu"):  # safetensors and transformers read into what the process has made the default device
            model = _load_model(folder, config, _dtype(dtype), _device(device), backend, trust_remote_code)
        tokenizer = load_tokenizer(folder, trust_remote_code)
        return cls(
            model,
            read_vocabulary(folder, config, tokenizer),
            tokenizer,
            max_batch_tokens=max_batch_tokens,
            kv_cache_tokens=kv_cache_tokens,
            max_batch_size=max_batch_size,
        )

    def refine(self, requests: Iterable[RequestLike], options: RefineOptions | None = None) -> list[Result]:
        """Refines all requests, in the order given; a bad request gets a result with its error, the others go on."""
        return list(self.stream(requests, options))

    def stream(
        self, requests: Iterable[RequestLike], options: RefineOptions | None = None, *, ordered: bool = True
    ) -> Generator[Result, None, None]:
        """Yields results while later requests are still being read, in input order or as they finish.

        Requests are taken from the iterable only as fast as they are worked on, so it may be endless.
        """
        early: dict[int, Result] = {}  # finished before an earlier one, by index
        due = 0
        with Session(self, options) as session:
            for result in self._finished(session, iter(requests), early):
                if not ordered:
                    yield result
                    continue
                early[result.index] = result
                while due in early:
                    yield early.pop(due)
                    due += 1

    def session(self, options: RefineOptions | None = None) -> Session:
        """A session: requests are added one by one and results collected after each step, by one thread."""
        self._alive()
        return Session(self, options)

    @property
    def max_batch_size(self) -> int:
        """Sequences that run at once."""
        return self._alive().max_batch_size

    def check_integrity(self) -> None:
        """Raises AssertionError if the KV pool has lost a page or given one to two sequences."""
        with self._lock:
            self._drop_abandoned()
            self._alive().check_integrity()

    def close(self) -> None:
        """Frees weights and cache; calls and streams that are still open raise EngineDead. May be called again."""
        with self._lock:
            scheduler, self._scheduler = self._scheduler, None
            if scheduler is not None:
                scheduler.close()

    def __enter__(self) -> "Refiner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _finished(
        self, session: Session, requests: Iterator[RequestLike], early: dict[int, Result]
    ) -> Iterator[Result]:
        index, more = 0, True
        while more or session.open:
            # one long answer must not let an endless input pile up behind it
            while more and session.has_room and len(early) < RESULTS_HELD * self.max_batch_size:
                try:
                    value = next(requests)
                except StopIteration:
                    more = False
                    break
                failed = session.add(value, index)
                index += 1
                if failed:
                    yield failed
            if more or session.open:
                yield from session.step()

    def _alive(self) -> Scheduler:
        if self._scheduler is None:
            raise EngineDead("this Refiner is closed: load a new one")
        return self._scheduler

    def _drop_abandoned(self) -> None:
        while self._abandoned:
            sequence = self._abandoned.popleft()
            if self._scheduler is not None:
                self._scheduler.cancel(sequence)

    def _encode(self, request: Request, options: RefineOptions) -> tuple[list[int], list[int]]:
        """Prompt and draft ids of a request that fits the model and the KV pool."""
        scheduler = self._alive()
        try:
            prompt, draft = self._codec.encode(request, options.condition, options.keep_prefix)
        except InvalidRequest:
            raise
        except Exception as error:  # tokenizers and templates fail in ways of their own; it costs this request only
            raise InvalidRequest(f"the refiner's tokenizer cannot encode this request: {error!r:.200}") from error
        longest = len(prompt) + options.max_new_tokens
        need = f"prompt of {len(prompt)} tokens + max_new_tokens {options.max_new_tokens} = {longest}"
        if longest > scheduler.model.max_positions:
            limit = scheduler.model.max_positions
            raise RequestTooLong(f"{need} exceeds the model's {limit} positions: shorten the prompt or max_new_tokens")
        pool = scheduler.cache.pool.size
        if pages_for(longest) > pool:
            raise RequestTooLong(
                f"{need} exceeds the KV pool of {pool * PAGE_SIZE} tokens: raise kv_cache_tokens or shorten the request"
            )
        return prompt, draft

    def _sequence(self, request: Request, options: RefineOptions) -> JacobiSequence:
        prompt, draft = self._encode(request, options)
        seed = options.seed if request.seed is None else request.seed
        return JacobiSequence(prompt, draft, options, self._codec.vocabulary, self._knee, seed)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    value = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if value not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f'dtype must be "float32", "bfloat16" or "float16", got {dtype!r}')
    return value


def _device(device: str | torch.device) -> torch.device:
    try:
        value = torch.device(device)
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return value


def _load_model(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, backend: Backend, remote: bool
) -> CausalModel:
    if backend != "hf":
        try:
            return Decoder.load(folder, config, dtype, device)
        except UnsupportedModel as error:
            if backend == "lean":
                raise
            logger.info("falling back to the transformers modules: %s", error)
    from engine.hf import HFModel

    return HFModel.load(folder, dtype, device, remote)


def _warn_of_processors(folder: Path, generation: GenerationConfig) -> None:
    """Says which settings change what transformers' greedy generate gives, and not what the engine gives."""
    neutral: dict[str, tuple[Any, ...]] = {
        "repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,), "min_length": (0,), "min_new_tokens": (0,),
        "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "bad_words_ids": ([],), "sequence_bias": ({},),
        "forced_bos_token_id": (), "forced_eos_token_id": (), "exponential_decay_length_penalty": (),
        "guidance_scale": (1.0,), "num_beams": (1,),
    }  # fmt: skip
    values = {name: getattr(generation, name, None) for name in neutral}
    set_ones = {name: value for name, value in values.items() if value is not None and value not in neutral[name]}
    if set_ones:
        logger.warning("%s/generation_config.json: the engine decodes without %s", folder, set_ones)


def read_vocabulary(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> Vocabulary:
    """EOS and pad ids: from the generation config, which is what transformers' generate reads; where that has none, from the
    model's configuration, then from the tokenizer."""
    config = config.get_text_config()
    sources: list[Any] = [config, tokenizer]
    if (folder / "generation_config.json").exists():
        generation = GenerationConfig.from_pretrained(folder)
        _warn_of_processors(folder, generation)
        sources.insert(0, generation)

    def first(name: str) -> Any:
        return next((v for s in sources if (v := getattr(s, name, None)) is not None), None)

    eos = first("eos_token_id")
    eos_ids = frozenset(eos if isinstance(eos, list | tuple) else [] if eos is None else [eos])
    pad = first("pad_token_id")
    if isinstance(pad, list) or pad is None or not 0 <= pad < config.vocab_size:
        pad = min(eos_ids, default=0)
    return Vocabulary(config.vocab_size, eos_ids, int(pad))
