"""Jacobi iteration without the host: steps are launched back to back, and what they did is read one step late.

A sequence comes in when all of its prompt but the last token is in the cache. From there on the device decides what is fed,
accepted and guessed (``jacobi_pack``, ``jacobi_accept``); the host chooses how many rows the next step has room for, lets
sequences in and takes out those that ended.
"""

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import StepBatch
from engine.errors import EngineError
from engine.jacobi import JacobiSequence, Vocabulary
from engine.kernels import (
    PAGE_SIZE,
    Field,
    JacobiState,
    PackedRows,
    Phase,
    jacobi_accept,
    jacobi_pack,
    linear_argmax,
)
from engine.kernels.jacobi_state import LONGEST_TEXT, MOST_GUESSES
from engine.kv_cache import KVCache, pages_for
from engine.model import CausalModel
from engine.request import FinishReason
from engine.step_runner import CudaRecorder, EagerRunner, GraphRunner, StepRunner

LONGEST_ANSWER = 4096
"""Tokens of an answer that a slot holds; longer ones stay with the host."""
_ROW_COUNTS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_REASONS: dict[int, FinishReason] = {Phase.EOS: "eos", Phase.LENGTH: "length", Phase.STEPS: "steps"}


def choose_loop(
    model: CausalModel, cache: KVCache, vocabulary: Vocabulary, knee: int, max_batch_tokens: int, max_batch_size: int
) -> "DeviceLoop | None":
    """The loop for this model, None where the host moves every sequence: on CPUs and through transformers' modules.

    ``DIFFPO_LOOP`` forces ``host``, ``device`` (no CUDA graphs; on any device) or ``graphs``.
    """
    default = "graphs" if model.device.type == "cuda" and model.takes_padding else "host"
    choice = os.environ.get("DIFFPO_LOOP") or default
    if choice not in ("host", "device", "graphs"):
        raise ValueError(f'DIFFPO_LOOP must be "host", "device" or "graphs", got {choice!r}')
    if choice == "host" or not model.takes_padding:
        return None
    if choice == "graphs" and model.device.type != "cuda":
        raise ValueError(f"DIFFPO_LOOP=graphs needs a CUDA device, got {model.device}: use device or host")
    runner = _graph_runner(model.device) if choice == "graphs" else EagerRunner
    return DeviceLoop(model, cache, vocabulary, knee, max_batch_tokens, max_batch_size, runner)


def _graph_runner(device: torch.device) -> Callable[[Callable[[int], None]], StepRunner]:
    return lambda step: GraphRunner(step, CudaRecorder(device))


def row_counts(most: int) -> tuple[int, ...]:
    """Rows that steps are launched with: few sizes, so that each can be a graph of its own; ``most`` is the last."""
    return (*(count for count in _ROW_COUNTS if count < most), most)


class Reading:
    """A tensor's values on their way to the host, as they are when the work launched so far is done."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self._values = tensor.clone()
            return
        self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._values.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(tensor.device))

    def ready(self) -> bool:
        """Whether ``wait`` would not have to."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """The values, on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._values


@dataclass(slots=True)
class _Occupant:
    """What the host knows of a slot's sequence; ``wanted`` and ``may_end`` are those of the step last read."""

    sequence: JacobiSequence
    reserved: int
    """Rows that every step must have room for."""
    since: int
    """The first launch it takes part in."""
    wanted: int
    may_end: bool


@dataclass(frozen=True, slots=True)
class _Leaving:
    """A sequence that ended; its text is on the way."""

    sequence: JacobiSequence
    fields: list[int]
    text: Reading


class DeviceLoop:
    """Slots for sequences and the launching of their steps. Same rule as the scheduler's: one caller at a time."""

    def __init__(
        self,
        model: CausalModel,
        cache: KVCache,
        vocabulary: Vocabulary,
        knee: int,
        max_batch_tokens: int,
        max_batch_size: int,
        runner: Callable[[Callable[[int], None]], StepRunner] = EagerRunner,
    ) -> None:
        self._model, self._cache, self._vocabulary, self._knee = model, cache, vocabulary, knee
        self._sizes = row_counts(max_batch_tokens)
        slots = min(max_batch_size, max_batch_tokens)
        end = min(model.max_positions, cache.pool.size * PAGE_SIZE)
        places = 1 + min(LONGEST_ANSWER, end)
        self.state = JacobiState.allocate(slots, places, pages_for(end), model.device)
        self._rows = PackedRows.allocate(max_batch_tokens, slots, model.device)
        self._batches = {size: self._batch(size, end) for size in self._sizes}
        self._eos = torch.tensor(sorted(vocabulary.eos) or [-1], dtype=torch.int32, device=model.device)
        self._queue: deque[JacobiSequence] = deque()
        self._occupants: list[_Occupant | None] = [None] * slots
        self._launches = 0
        self._readings: deque[tuple[int, Reading]] = deque()  # by the number of their launch, oldest first
        self._leaving: list[_Leaving] = []
        self._runner = runner(self._step)

    @property
    def load(self) -> int:
        """Sequences it holds."""
        return len(self._queue) + len(self._active()) + len(self._leaving)

    def takes(self, sequence: JacobiSequence) -> bool:
        """Whether this sequence can be moved here at all."""
        options = sequence.options
        return (
            options.temperature == 0
            and options.max_new_tokens < self.state.text.shape[1]
            and _reserved_rows(sequence) <= self._sizes[-1]
        )

    def add(self, sequence: JacobiSequence) -> None:
        """Queues a sequence of which all certain tokens but the last are in the cache."""
        self._queue.append(sequence)

    def step(self) -> None:
        """Launches a step and takes in what the one before it did; sequences that ended get their results."""
        # where this may have been the last step for everyone, another is not launched behind it unseen
        if self._readings and all(o.may_end and o.since <= self._launches for o in self._active()):
            self._look()
        self._admit()
        if self._active():
            self._launch()
            if len(self._readings) > 1:
                self._look()
        else:
            self._readings.clear()
        idle = not self._active()
        for leaving in [one for one in self._leaving if idle or one.text.ready()]:
            self._leaving.remove(leaving)
            _conclude(leaving)

    def drop(self, sequence: JacobiSequence) -> None:
        """Lets a sequence go, wherever it is; nothing launched from now on touches its pages."""
        self._leaving = [one for one in self._leaving if one.sequence is not sequence]
        if sequence in self._queue:
            self._queue.remove(sequence)
        for slot, occupant in enumerate(self._occupants):
            if occupant is not None and occupant.sequence is sequence:
                self._occupants[slot] = None
                self.state.fields[slot].zero_()

    def fail(self, error: EngineError) -> None:
        """Ends all sequences with an error."""
        inside = [occupant.sequence for occupant in self._active()] + [leaving.sequence for leaving in self._leaving]
        for sequence in (*self._queue, *inside):
            sequence.fail(error)
        self._queue.clear()
        self._occupants = [None] * len(self._occupants)
        self._readings.clear()
        self._leaving.clear()
        with suppress(RuntimeError):  # of a device that is lost the next launch tells
            self.state.fields.zero_()

    def close(self) -> None:
        """Frees the captured graphs."""
        self._runner.close()

    def _admit(self) -> None:
        """Fills free slots in the order of arrival; who needs more rows than are left holds up those behind."""
        while self._queue and None in self._occupants:
            taken = sum(occupant.reserved for occupant in self._active())
            if taken + _reserved_rows(self._queue[0]) > self._sizes[-1]:
                return
            self._enter(self._queue.popleft(), self._occupants.index(None))

    def _enter(self, sequence: JacobiSequence, slot: int) -> None:
        text, fields = _contents(sequence)
        state, device = self.state, self.state.text.device
        answer = torch.full((2, state.text.shape[1]), self._vocabulary.pad, dtype=torch.int32)
        answer[0, : len(text)] = torch.tensor(text, dtype=torch.int32)
        answer[1, : len(text) - 1] = answer[0, 1 : len(text)]
        policy = sequence.policy
        rates = (policy.first.value, policy.first.weight, policy.run.value, policy.run.weight)
        pages = torch.zeros(state.block_table.shape[1], dtype=torch.int32)
        pages[: len(sequence.pages)] = torch.tensor(sequence.pages, dtype=torch.int32)
        for to, values in (
            (state.text, answer[0]),
            (state.draft, answer[1]),
            (state.block_table, pages),
            (state.rates, torch.tensor(rates)),
            (state.fields, torch.tensor(fields, dtype=torch.int32)),
        ):
            # behind what was launched before, and without waiting for it
            to[slot].copy_(values.pin_memory() if device.type == "cuda" else values, non_blocking=True)
        wanted, may_end = self._first_step(sequence)
        self._occupants[slot] = _Occupant(sequence, _reserved_rows(sequence), self._launches + 1, wanted, may_end)

    def _active(self) -> list[_Occupant]:
        return [occupant for occupant in self._occupants if occupant is not None]

    def _batch(self, size: int, end: int) -> StepBatch:
        rows = self._rows.first(size)
        return StepBatch(
            token_ids=rows.token_ids, positions=rows.positions, slots=rows.slots, row_start=rows.row_start,
            first_position=rows.first_position, block_table=self.state.block_table, logit_rows=None, end=end,
        )  # fmt: skip

    @torch.inference_mode()
    def _step(self, size: int) -> None:
        """All of a step with ``size`` packed rows: what a graph holds."""
        head = self._model.head
        jacobi_pack(self.state, self._rows.first(size), self._knee)
        hidden = self._model.forward(self._batches[size], self._cache)
        row_start = self._rows.row_start
        predictions, _ = linear_argmax(hidden, head.weight, head.bias, softcap=head.softcap, row_count=row_start[-1:])
        jacobi_accept(self.state, predictions, row_start, self._eos)

    def _launch(self) -> None:
        self._runner.launch(self._room())
        self._launches += 1
        self._readings.append((self._launches, Reading(self.state.fields)))

    def _room(self) -> int:
        """How many rows the next step is launched with."""
        demand = sum(max(occupant.reserved, occupant.wanted) for occupant in self._active())
        # what is known of it is two steps old: where rows are nearly free, there is room for twice as many
        demand = max(demand, min(2 * demand, self._knee))
        return next((size for size in self._sizes if size >= demand), self._sizes[-1])

    def _look(self) -> None:
        """Takes in the oldest launch's results."""
        launch, reading = self._readings.popleft()
        values = reading.wait()
        for slot, occupant in enumerate(self._occupants):
            if occupant is None or occupant.since > launch:
                continue
            fields: list[int] = values[slot].tolist()
            occupant.wanted, occupant.may_end = fields[Field.WANTED], bool(fields[Field.MAY_END])
            if fields[Field.PHASE] != Phase.RUNNING:
                self._occupants[slot] = None
                self._leaving.append(_Leaving(occupant.sequence, fields, Reading(self.state.text[slot])))

    def _first_step(self, sequence: JacobiSequence) -> tuple[int, bool]:
        """Rows a sequence will want first, and whether EOS or its limit is among their guesses."""
        options, known, guess = sequence.options, len(sequence.final), sequence.guess
        if options.steps is not None:
            rows = sequence.block_end - known
        elif options.window == "auto":
            sequences = options.concurrency or len(self._active()) + 1
            rows = 1 + sequence.policy.guesses(min(len(guess), options.max_new_tokens - known - 1), sequences)
        else:
            rows = min(options.window, options.max_new_tokens - known)
        ends = known + rows >= options.max_new_tokens or not self._vocabulary.eos.isdisjoint(guess[:rows])
        return rows, ends


def _reserved_rows(sequence: JacobiSequence) -> int:
    """Rows that a sequence gets in every step: one, or all it can want where a step may not depend on the others."""
    options = sequence.options
    if options.steps is not None:
        # a block that was given up is fed again, with the next one behind it
        return min(2 * options.block_size, options.max_new_tokens)
    if options.concurrency is None:
        return 1
    return min(MOST_GUESSES + 1 if options.window == "auto" else options.window, options.max_new_tokens)


def _contents(sequence: JacobiSequence) -> tuple[list[int], list[int]]:
    """Text and fields of a slot for a sequence that has not been moved yet."""
    options = sequence.options
    text = [sequence.prompt[-1], *sequence.final, *sequence.guess]
    fields = {
        Field.PHASE: Phase.RUNNING,
        Field.KNOWN: len(sequence.final) + 1,
        Field.VALID: len(sequence.final),
        Field.GUESSED: len(text),
        Field.ROWS: sequence.forward_tokens,
        Field.CONVERGED: 1,
        Field.BLOCK_END: sequence.block_end + 1,
        Field.EXPECTED: len(sequence.final),
        Field.BASE: len(sequence.prompt) - 1,
        Field.LIMIT: options.max_new_tokens + 1,
        Field.WINDOW: 0 if options.window == "auto" else min(options.window, LONGEST_TEXT),
        Field.CONCURRENCY: min(options.concurrency or 0, LONGEST_TEXT),
        Field.STEP_LIMIT: min(options.steps or 0, LONGEST_TEXT),
        Field.BLOCK_SIZE: min(options.block_size, LONGEST_TEXT),
        Field.DRAFT: len(text) - 1,
        Field.REALIGN: options.realign and options.steps is None,
    }
    return text, [int(fields.get(field, 0)) for field in Field]


def _conclude(leaving: _Leaving) -> None:
    """Gives a sequence its result."""
    sequence, fields = leaving.sequence, leaving.fields
    sequence.final = leaving.text.wait()[1 : fields[Field.KNOWN]].tolist()
    sequence.steps, sequence.forward_tokens = fields[Field.STEPS], fields[Field.ROWS]
    sequence.converged = bool(fields[Field.CONVERGED])
    if fields[Field.PHASE] == Phase.NAN:
        sequence.fail_at_nan()
    else:
        sequence.finish_reason = _REASONS[fields[Field.PHASE]]
