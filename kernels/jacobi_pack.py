"""The rows of the next Jacobi step, chosen and written on the device."""

import torch
from torch import Tensor

from engine.kernels.jacobi_state import MOST_GUESSES, Field, JacobiState, NoiseRows, PackedRows, Phase, Rate
from engine.kernels.native import Impl
from engine.kernels.paged_attention import PAGE_SIZE
from engine.kernels.triton_choice import choose_triton


def jacobi_pack(
    state: JacobiState, rows: PackedRows, knee: int, noise: NoiseRows | None = None, *, impl: Impl = "auto"
) -> None:
    """Fills ``rows`` from the running slots of ``state``; nothing on the host decides how many of them each gets.

    A slot feeds its certain tokens from VALID on, then guesses: its whole block (STEP_LIMIT), WINDOW rows, or as many as
    are worth their cost by its acceptance rates and ``knee``, the rows that cost as much as one (engine/window.py). With a
    STEP_LIMIT or a CONCURRENCY a slot gets all of them or, where they do not fit, no row at all; of the others each gets
    its certain row, and the rows left are shared so that whoever wants more than a common level gets that level.
    PLANNED and WANTED are set. ``noise``, where given, gets what the rows' predictions are drawn with.
    """
    size = rows.token_ids.shape[0]
    if noise is not None and noise.seeds.shape[0] != size:
        raise ValueError(f"noise needs an entry per row: got {noise.seeds.shape[0]} for {size} rows")
    supported = rows.row_start.shape[0] == state.fields.shape[0] + 1 and size > 0
    if choose_triton(impl, state.text, supported, "at least one row, and as many slots in rows as in state"):
        from engine.kernels.gpu.jacobi_pack import pack

        with torch.cuda.device_of(state.text):  # Triton launches on the current device
            pack(state, rows, knee, noise)
        return
    if impl == "cpp":
        raise ValueError('impl="cpp" cannot run here: there is no C++ kernel; use impl="auto" or impl="torch"')
    _reference(state, rows, knee, noise)


def _reference(state: JacobiState, rows: PackedRows, knee: int, noise: NoiseRows | None) -> None:
    wanted, rigid = _wanted_guesses(state, knee)
    guesses, counts = _shared(state, wanted, rigid, rows.token_ids.shape[0])
    state[Field.PLANNED].copy_(guesses)
    state[Field.WANTED].copy_(wanted + state[Field.KNOWN] - state[Field.VALID])
    state[Field.WANTED].masked_fill_(state[Field.PHASE] != Phase.RUNNING, 0)
    rows.row_start[0] = 0
    rows.row_start[1:].copy_(counts.cumsum(0))
    rows.first_position.copy_((state[Field.BASE] + state[Field.VALID]).masked_fill(counts == 0, 0))
    _write_rows(state, rows, noise)


def _wanted_guesses(state: JacobiState, knee: int) -> tuple[Tensor, Tensor]:
    """Guesses that every slot would feed with room for all, and whether it must have all of them."""
    known = state[Field.KNOWN]
    left = state[Field.LIMIT] - known - 1  # the last place is predicted, never fed
    stepping, window = state[Field.STEP_LIMIT] > 0, state[Field.WINDOW]
    concurrency = state[Field.CONCURRENCY]
    sequences = torch.where(concurrency > 0, concurrency, (state[Field.PHASE] == Phase.RUNNING).sum())
    by_rates = _worth_their_rows(state, torch.minimum(left, state[Field.GUESSED] - known), sequences, knee)
    wanted = torch.where(window > 0, torch.minimum(left, window - 1), by_rates)
    wanted = torch.where(stepping, state[Field.BLOCK_END] - known - 1, wanted)
    return wanted.clamp_min(0), stepping | (concurrency > 0)


def _worth_their_rows(state: JacobiState, available: Tensor, sequences: Tensor, knee: int) -> Tensor:
    """WindowPolicy.guesses of every slot [slots]."""
    run = state.rates[:, Rate.RUN]
    first = torch.where(state[Field.IN_RUN] > 0, run, state.rates[:, Rate.FIRST])
    guess = torch.arange(MOST_GUESSES, device=run.device)
    chance = torch.cat((first[:, None], run[:, None].expand(-1, MOST_GUESSES - 1)), dim=1).cumprod(1)
    tokens = 1 + chance.cumsum(1) - chance
    cost = knee + sequences[:, None] * (guess + 1)
    worth = (chance * cost >= sequences[:, None] * tokens) & (guess < available[:, None])
    return worth.int().cumprod(1).sum(1, dtype=torch.int32)


def _shared(state: JacobiState, wanted: Tensor, rigid: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Guesses and rows of every slot."""
    running = state[Field.PHASE] == Phase.RUNNING
    certain = state[Field.KNOWN] - state[Field.VALID]
    reserved = torch.where(running, certain + torch.where(rigid, wanted, 0), 0)
    fits = running & (reserved.cumsum(0) <= size)
    spare = size - torch.where(fits, reserved, 0).sum()
    elastic = torch.where(fits & ~rigid, wanted, 0)
    levels = torch.arange(size + 1, device=elastic.device)
    level = (torch.minimum(elastic[:, None], levels).sum(0) <= spare).sum() - 1
    given = torch.minimum(elastic, level)
    # less than one row for each is left; the first get it
    above = elastic > given
    given = given + (above & (above.cumsum(0) <= spare - given.sum()))
    guesses = torch.where(fits, torch.where(rigid, wanted, given), 0).int()
    return guesses, torch.where(fits, certain + guesses, 0)


def _write_rows(state: JacobiState, rows: PackedRows, noise: NoiseRows | None) -> None:
    start = rows.row_start.long()
    row = torch.arange(rows.token_ids.shape[0], device=start.device)
    slot = torch.searchsorted(start[1:], row, right=True)
    padding = slot == state.fields.shape[0]
    slot = slot.masked_fill(padding, 0)
    offset = row - start[slot]
    position = (rows.first_position[slot] + offset).masked_fill(padding, 0)
    place = (state[Field.VALID][slot] + offset).masked_fill(padding, 0)
    page = state.block_table[slot, position // PAGE_SIZE].long()
    rows.token_ids.copy_(state.text[slot, place].masked_fill(padding, 0))
    rows.positions.copy_(position)
    rows.slots.copy_((page * PAGE_SIZE + position % PAGE_SIZE).masked_fill(padding, -1))
    if noise is not None:
        noise.temperature.copy_(state.temperature[slot].masked_fill(padding, 0))
        noise.seeds.copy_(state.seeds[slot].masked_fill(padding, 0))
        noise.positions.copy_(place)  # the token at place i predicts the answer's token i
