"""Jacobi iteration without the host: steps are launched back to back, and what they did is read one step late.

A sequence comes in when all of its prompt but the last token is in the cache. From there on the device decides what is fed,
accepted and guessed (``jacobi_pack``, ``jacobi_accept``); the host chooses how many rows the next step has room for, lets
sequences in and takes out those that ended.
"""

import os
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import StepBatch
from engine.jacobi import JacobiSequence, Vocabulary
from engine.kernels import (
    PAGE_SIZE,
    Field,
    JacobiState,
    NoiseRows,
    PackedRows,
    Phase,
    jacobi_accept,
    jacobi_pack,
    linear_argmax,
    linear_sample,
)
from engine.kernels.jacobi_state import LONGEST_TEXT
from engine.kernels.triton_choice import reason_against_triton
from engine.kv_cache import KVCache, pages_for
from engine.loop_slot import Reading, conclude, fill, read_text, reserved_rows, show
from engine.model import CausalModel
from engine.step_runner import CudaRecorder, EagerRunner, GraphRunner, StepKind, StepRunner

LONGEST_ANSWER = LONGEST_TEXT - 1
"""Tokens of an answer that a slot holds; longer ones stay with the host. Memory does not limit it: a slot of this length takes
12 bytes per token, 197 kB, less than K/V of a single token of Gemma-2-9B (344 kB in bfloat16). What does is re-alignment,
which reads draft, iterate and answer in one program per sequence: 64 blocks each, within every step."""
_SLOT_COUNTS = (1, 8)
_ROW_COUNTS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)


def choose_loop(
    model: CausalModel, cache: KVCache, vocabulary: Vocabulary, knee: int, max_batch_tokens: int, max_batch_size: int
) -> "DeviceLoop | None":
    """The loop for this model, None where the host moves every sequence: on CPUs, through transformers' modules, and where
    no kernels can be launched, whose PyTorch references ask the device for values, which nothing captured may.

    ``DIFFPO_LOOP`` forces ``host``, ``device`` (no CUDA graphs; on any device) or ``graphs``.
    """
    kernels = model.device.type == "cuda" and reason_against_triton(model.head.weight.data) is None
    default = "graphs" if kernels and model.takes_padding else "host"
    choice = os.environ.get("DIFFPO_LOOP") or default
    if choice not in ("host", "device", "graphs"):
        raise ValueError(f'DIFFPO_LOOP must be "host", "device" or "graphs", got {choice!r}')
    if choice == "host" or not model.takes_padding:
        return None
    if choice == "graphs" and model.device.type != "cuda":
        raise ValueError(f"DIFFPO_LOOP=graphs needs a CUDA device, got {model.device}: use device or host")
    runner = _graph_runner(model.device) if choice == "graphs" else EagerRunner
    return DeviceLoop(model, cache, vocabulary, knee, max_batch_tokens, max_batch_size, runner)


def _graph_runner(device: torch.device) -> Callable[[Callable[[StepKind], None]], StepRunner]:
    return lambda step: GraphRunner(step, CudaRecorder(device))


def row_counts(most: int) -> tuple[int, ...]:
    """Rows that steps are launched with: few sizes, so that each can be a graph of its own; ``most`` is the last."""
    return (*(count for count in _ROW_COUNTS if count < most), most)


def slot_counts(most: int) -> tuple[int, ...]:
    """Slots that steps are launched with. Attention divides its work by how many sequences there may be: planned for all the
    slots, a single sequence's keys would stay in too few programs to fill a GPU."""
    return (*(count for count in _SLOT_COUNTS if count < most), most)


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
class _Launch:
    """What a launch did, on its way to the host."""

    number: int
    fields: Reading
    texts: dict[int, Reading]
    """By slot, of sequences that are observed."""


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
        runner: Callable[[Callable[[StepKind], None]], StepRunner] = EagerRunner,
    ) -> None:
        self._model, self._cache, self._vocabulary, self._knee = model, cache, vocabulary, knee
        self._sizes = row_counts(max_batch_tokens)
        slots = min(max_batch_size, max_batch_tokens)
        self._slot_counts = slot_counts(slots)
        self._end = min(model.max_positions, cache.pool.size * PAGE_SIZE)
        places = 1 + min(LONGEST_ANSWER, self._end)
        self.state = JacobiState.allocate(slots, places, cache.pool.rounded(pages_for(self._end)), model.device)
        self._rows = PackedRows.allocate(max_batch_tokens, slots, model.device)
        self._noise = NoiseRows.allocate(max_batch_tokens, model.device)
        self._eos = torch.tensor(sorted(vocabulary.eos) or [-1], dtype=torch.int32, device=model.device)
        self._queue: deque[JacobiSequence] = deque()
        self._occupants: list[_Occupant | None] = [None] * slots
        self._launches = 0
        self._unread: deque[_Launch] = deque()  # oldest first
        self._leaving: list[_Leaving] = []
        # a runner that kept its loop would make a cycle of them: weights and cache would stay until the collector came by
        this = weakref.proxy(self)
        self._runner = runner(lambda kind: this._step(kind))

    @property
    def load(self) -> int:
        """Sequences it holds."""
        return len(self._queue) + len(self._active()) + len(self._leaving)

    def takes(self, sequence: JacobiSequence) -> bool:
        """Whether this sequence can be moved here at all."""
        options = sequence.options
        return (
            (options.temperature == 0 or options.top_p == 1)
            and options.max_new_tokens < self.state.text.shape[1]
            and reserved_rows(sequence) <= self._sizes[-1]
        )

    def add(self, sequence: JacobiSequence) -> None:
        """Queues a sequence of which all certain tokens but the last are in the cache."""
        self._queue.append(sequence)

    def step(self) -> None:
        """Launches a step and takes in what the one before it did; sequences that ended get their results."""
        # where this may have been the last step for everyone, another is not launched behind it unseen
        if self._unread and all(o.may_end and o.since <= self._launches for o in self._active()):
            self._look()
        self._admit()
        if self._active():
            self._launch()
            if len(self._unread) > 1:
                self._look()
        else:
            self._unread.clear()
        idle = not self._active()
        for leaving in [one for one in self._leaving if idle or one.text.ready()]:
            self._leaving.remove(leaving)
            conclude(leaving.sequence, leaving.fields, leaving.text)

    def drop(self, sequence: JacobiSequence) -> None:
        """Lets a sequence go, wherever it is; nothing launched from now on touches its pages."""
        self._leaving = [one for one in self._leaving if one.sequence is not sequence]
        if sequence in self._queue:
            self._queue.remove(sequence)
        for slot, occupant in enumerate(self._occupants):
            if occupant is not None and occupant.sequence is sequence:
                self._occupants[slot] = None
                self.state.fields[slot].zero_()

    def clear(self) -> None:
        """Lets all sequences go, after a step that failed."""
        self._queue.clear()
        self._occupants = [None] * len(self._occupants)
        self._unread.clear()
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
            if taken + reserved_rows(self._queue[0]) > self._sizes[-1]:
                return
            self._enter(self._queue.popleft(), self._occupants.index(None))

    def _enter(self, sequence: JacobiSequence, slot: int) -> None:
        fill(self.state, slot, sequence, self._vocabulary.pad)
        wanted, may_end = self._first_step(sequence)
        self._occupants[slot] = _Occupant(sequence, reserved_rows(sequence), self._launches + 1, wanted, may_end)

    def _active(self) -> list[_Occupant]:
        return [occupant for occupant in self._occupants if occupant is not None]

    @torch.inference_mode()
    def _step(self, kind: StepKind) -> None:
        """All of a step: what a graph holds."""
        state, rows = self.state.first(kind.slots), self._rows.first(kind.rows, kind.slots)
        noise = self._noise.first(kind.rows) if kind.sampled else None
        jacobi_pack(state, rows, self._knee, noise)
        batch = StepBatch(
            token_ids=rows.token_ids, positions=rows.positions, slots=rows.slots, row_start=rows.row_start,
            first_position=rows.first_position, block_table=state.block_table, logit_rows=None, end=self._end,
        )  # fmt: skip
        predictions = self._predict(self._model.forward(batch, self._cache), noise, rows.row_start[-1:])
        jacobi_accept(state, predictions, rows.row_start, self._eos)

    def _predict(self, hidden: Tensor, noise: NoiseRows | None, row_count: Tensor) -> Tensor:
        head = self._model.head
        if noise is None:
            return linear_argmax(hidden, head.weight, head.bias, softcap=head.softcap, row_count=row_count)[0]
        return linear_sample(
            hidden, head.weight, head.bias, temperature=noise.temperature, seeds=noise.seeds, positions=noise.positions,
            softcap=head.softcap, row_count=row_count,
        )[0]  # fmt: skip

    def _launch(self) -> None:
        sampled = any(occupant.sequence.options.temperature > 0 for occupant in self._active())
        used = 1 + max(slot for slot, occupant in enumerate(self._occupants) if occupant is not None)
        slots = next(count for count in self._slot_counts if count >= used)
        self._runner.launch(StepKind(self._room(), sampled, slots))
        self._launches += 1
        texts = {
            slot: read_text(self.state, slot, occupant.sequence)
            for slot, occupant in enumerate(self._occupants)
            if occupant is not None and occupant.sequence.observed
        }
        self._unread.append(_Launch(self._launches, Reading(self.state.fields), texts))

    def _room(self) -> int:
        """How many rows the next step is launched with."""
        demand = sum(max(occupant.reserved, occupant.wanted) for occupant in self._active())
        # what is known of it is two steps old: where rows are nearly free, there is room for twice as many
        demand = max(demand, min(2 * demand, self._knee))
        return next((size for size in self._sizes if size >= demand), self._sizes[-1])

    def _look(self) -> None:
        """Takes in the oldest launch's results."""
        launch = self._unread.popleft()
        values = launch.fields.wait()
        for slot, occupant in enumerate(self._occupants):
            if occupant is None or occupant.since > launch.number:
                continue
            fields: list[int] = values[slot].tolist()
            occupant.wanted, occupant.may_end = fields[Field.WANTED], bool(fields[Field.MAY_END])
            if fields[Field.PHASE] != Phase.RUNNING:
                self._occupants[slot] = None
                text = launch.texts.get(slot) or read_text(self.state, slot, occupant.sequence)
                self._leaving.append(_Leaving(occupant.sequence, fields, text))
            else:
                show(occupant.sequence, fields, launch.texts.get(slot))

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
