"""State of Jacobi iteration on the device: one slot per sequence, read and written by ``jacobi_pack`` and ``jacobi_accept``.

The text of a slot is indexed by *place*: place 0 is the last prompt token, place i + 1 the answer's token i. Final tokens
come first, guesses behind them; predictions replace guesses where they stand, so nothing is ever moved.
"""

from dataclasses import dataclass, fields
from enum import IntEnum

import torch
from torch import Tensor


class Phase(IntEnum):
    """What a slot's sequence is doing, or how it ended."""

    EMPTY = 0
    RUNNING = 1
    EOS = 2
    LENGTH = 3
    STEPS = 4
    """Out of steps: the rest of the iterate was taken as it was."""
    NAN = 5
    """The row that decides the next token holds only NaN; ``KNOWN`` says which token."""


class Field(IntEnum):
    """Columns of ``JacobiState.fields``; lengths and ends count places."""

    PHASE = 0
    KNOWN = 1
    """Places that are final."""
    VALID = 2
    """Places whose K/V is that of final tokens; the next step feeds from here on. At most KNOWN - 1."""
    GUESSED = 3
    """End of the guesses; behind it there is only padding."""
    PLANNED = 4
    """Guesses fed in the step under way."""
    WANTED = 5
    """Rows the step under way would have fed with room for all."""
    STEPS = 6
    ROWS = 7
    """Rows fed so far."""
    CONVERGED = 8
    MAY_END = 9
    """Whether the next step is seen to be able to end the sequence: EOS or the limit is among its guesses."""
    IN_RUN = 10
    """Whether the guess before the next one was right."""
    BLOCK_END = 11
    BLOCK_STEPS = 12
    EXPECTED = 13
    """Where in the draft the answer is taken to go on: an index of ``draft``."""
    ITERATE = 14
    """Tokens in ``iterate``."""
    BASE = 15
    """Position of place 0. This and what follows stay as they are while a sequence is in its slot."""
    LIMIT = 16
    WINDOW = 17
    """Rows per step, 0: chosen by acceptance."""
    CONCURRENCY = 18
    """Sequences to reckon with, 0: those that run."""
    STEP_LIMIT = 19
    """Steps per block, 0: iterate to the fixed point."""
    BLOCK_SIZE = 20
    DRAFT = 21
    """Tokens in ``draft``."""
    REALIGN = 22


class Rate(IntEnum):
    """Columns of ``JacobiState.rates``: acceptance of a first guess and of those behind a right one, see engine/window.py."""

    FIRST = 0
    FIRST_WEIGHT = 1
    RUN = 2
    RUN_WEIGHT = 3


DECAY = 0.9
"""How fast old observations of acceptance fade: about the last ten count."""
MOST_GUESSES = 255
"""In a step, where acceptance decides."""
LONGEST_MATCH = 8
"""Tokens that a place in the draft is compared by."""
NEARBY = 6
"""How far from where it is expected a single token may match: a longer distance needs two tokens in a row."""
LONGEST_TEXT = 1 << 14
"""Most places."""
LENGTH_UNIT = 1 << 17
"""A match's length in its score, which is 32 bits: more than twice any distance between two places."""


@dataclass(frozen=True, slots=True)
class JacobiState:
    """The tensors of all slots; what is behind a length is padding. int32 where nothing else is said."""

    fields: Tensor
    """[slots, len(Field)]."""
    rates: Tensor
    """[slots, len(Rate)] float32."""
    text: Tensor
    """[slots, places]."""
    draft: Tensor
    """[slots, places]."""
    iterate: Tensor
    """[slots, places]: the last iterate that was given up."""
    block_table: Tensor
    """[slots, pages]: the pages of a slot's sequence."""
    temperature: Tensor
    """[slots] float32; 0: greedy."""
    seeds: Tensor
    """[slots] int64, of the sampling noise."""

    @classmethod
    def allocate(cls, slots: int, places: int, pages: int, device: torch.device) -> "JacobiState":
        """Empty slots, for texts of up to ``places`` places in up to ``pages`` pages."""
        if places > LONGEST_TEXT:
            raise ValueError(
                f"a slot holds at most {LONGEST_TEXT} places, got {places}: leave longer texts to the host"
            )

        def zeros(columns: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(slots, columns, dtype=dtype, device=device)

        return cls(
            zeros(len(Field)),
            zeros(len(Rate), torch.float32),
            zeros(places),
            zeros(places),
            zeros(places),
            zeros(pages),
            torch.zeros(slots, dtype=torch.float32, device=device),
            torch.zeros(slots, dtype=torch.int64, device=device),
        )

    def first(self, slots: int) -> "JacobiState":
        """Views of the first ``slots`` slots."""
        return JacobiState(*(getattr(self, one.name)[:slots] for one in fields(self)))

    def __getitem__(self, field: Field) -> Tensor:
        """View of one field [slots]."""
        return self.fields[:, field]


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The rows of a step, in the order of the slots; those behind ``row_start[-1]`` are padding: token 0, slot -1."""

    token_ids: Tensor
    """[t] int64."""
    positions: Tensor
    """[t] int64."""
    slots: Tensor
    """[t] int64: where a row's K/V is stored, page * PAGE_SIZE + offset; -1: nowhere."""
    row_start: Tensor
    """[slots + 1] int32."""
    first_position: Tensor
    """[slots] int32."""

    @classmethod
    def allocate(cls, rows: int, slots: int, device: torch.device) -> "PackedRows":
        token_ids, positions, kv_slots = torch.zeros(3, rows, dtype=torch.int64, device=device).unbind(0)
        row_start, first_position = (torch.zeros(n, dtype=torch.int32, device=device) for n in (slots + 1, slots))
        return cls(token_ids, positions, kv_slots, row_start, first_position)

    def first(self, rows: int, slots: int) -> "PackedRows":
        """Views of the first ``rows`` rows, of the first ``slots`` slots."""
        return PackedRows(
            self.token_ids[:rows], self.positions[:rows], self.slots[:rows],
            self.row_start[: slots + 1], self.first_position[:slots],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class NoiseRows:
    """How the prediction of every packed row is drawn, as ``linear_sample`` takes it; padding rows are greedy."""

    temperature: Tensor
    """[t] float32."""
    seeds: Tensor
    """[t] int64."""
    positions: Tensor
    """[t] int64: response positions of what is predicted."""

    @classmethod
    def allocate(cls, rows: int, device: torch.device) -> "NoiseRows":
        seeds, positions = torch.zeros(2, rows, dtype=torch.int64, device=device).unbind(0)
        return cls(torch.zeros(rows, dtype=torch.float32, device=device), seeds, positions)

    def first(self, rows: int) -> "NoiseRows":
        """Views of the first ``rows`` rows."""
        return NoiseRows(self.temperature[:rows], self.seeds[:rows], self.positions[:rows])
