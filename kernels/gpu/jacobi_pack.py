"""Triton kernels of ``jacobi_pack``: one program plans for all slots, then the rows are written side by side."""

import triton
import triton.language as tl

from engine.kernels.gpu.jacobi_fields import (
    BASE,
    BLOCK_END,
    CONCURRENCY,
    GUESSED,
    IN_RUN,
    KNOWN,
    LIMIT,
    MOST_GUESSES,
    PHASE,
    PLANNED,
    RATES,
    RUNNING,
    STEP_LIMIT,
    VALID,
    WANTED,
    WIDTH,
    WINDOW,
)
from engine.kernels.jacobi_state import JacobiState, NoiseRows, PackedRows
from engine.kernels.paged_attention import PAGE_SIZE as POSITIONS

PAGE_SIZE = tl.constexpr(POSITIONS)
BLOCK = 128


def pack(state: JacobiState, rows: PackedRows, knee: int, noise: NoiseRows | None) -> None:
    """See engine.kernels.jacobi_pack."""
    slots, size = state.fields.shape[0], rows.token_ids.shape[0]
    plan_kernel[(1,)](
        state.fields, state.rates, rows.row_start, rows.first_position, slots, size, knee,
        LEVELS=size.bit_length(), SLOTS=triton.next_power_of_2(slots), num_warps=1 if slots <= 128 else 4,
    )  # fmt: skip
    rows_kernel[(triton.cdiv(size, BLOCK),)](
        state.fields, state.text, state.block_table, rows.token_ids, rows.positions, rows.slots, rows.row_start,
        rows.first_position, slots, size, state.text.shape[1], state.block_table.shape[1], state.temperature,
        state.seeds, *((None, None, None) if noise is None else (noise.temperature, noise.seeds, noise.positions)),
        NOISE=noise is not None, SEARCH=slots.bit_length(), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["slots", "size", "knee"])
def plan_kernel(
    fields: tl.tensor, rates: tl.tensor, row_start: tl.tensor, first_position: tl.tensor, slots: tl.tensor,
    size: tl.tensor, knee: tl.tensor, LEVELS: tl.constexpr, SLOTS: tl.constexpr,
) -> None:  # fmt: skip
    """Guesses and rows of every slot, as ``_reference`` of engine.kernels.jacobi_pack has them."""
    slot = tl.arange(0, SLOTS)
    inside = slot < slots
    at = fields + slot * WIDTH
    running = tl.load(at + PHASE, mask=inside, other=0) == RUNNING
    known, valid = tl.load(at + KNOWN, mask=running, other=0), tl.load(at + VALID, mask=running, other=0)
    stepping = tl.load(at + STEP_LIMIT, mask=running, other=0) > 0
    concurrency = tl.load(at + CONCURRENCY, mask=running, other=0)
    window = tl.load(at + WINDOW, mask=running, other=0)
    left = tl.load(at + LIMIT, mask=running, other=0) - known - 1
    sequences = tl.where(concurrency > 0, concurrency, tl.sum(running.to(tl.int32), 0))
    by_rates = running & (window == 0) & (stepping == 0)
    available = tl.where(by_rates, tl.minimum(left, tl.load(at + GUESSED, mask=running, other=0) - known), 0)
    wanted = _worth_their_rows(rates, at, slot, by_rates, available, sequences.to(tl.float32), knee)
    wanted = tl.where(window > 0, tl.minimum(left, window - 1), wanted)
    wanted = tl.where(stepping, tl.load(at + BLOCK_END, mask=running, other=0) - known - 1, wanted)
    wanted = tl.where(running, tl.maximum(wanted, 0), 0)

    rigid = stepping | (concurrency > 0)
    certain = known - valid
    reserved = tl.where(running, certain + tl.where(rigid, wanted, 0), 0)
    fits = running & (tl.cumsum(reserved, 0) <= size)
    spare = size - tl.sum(tl.where(fits, reserved, 0), 0)
    elastic = tl.where(fits & (rigid == 0), wanted, 0)
    level = 0
    for bit in tl.static_range(LEVELS):
        higher = level + (1 << (LEVELS - 1 - bit))
        room = (higher <= size) & (tl.sum(tl.minimum(elastic, higher), 0) <= spare)
        level = tl.where(room, higher, level)
    given = tl.minimum(elastic, level)
    above = elastic > given
    extra = above & (tl.cumsum(above.to(tl.int32), 0) <= spare - tl.sum(given, 0))
    guesses = tl.where(fits, tl.where(rigid, wanted, given + extra.to(tl.int32)), 0)
    counts = tl.where(fits, certain + guesses, 0)
    tl.store(at + PLANNED, guesses, mask=inside)
    tl.store(at + WANTED, wanted + certain, mask=inside)
    tl.store(row_start + slot + 1, tl.cumsum(counts, 0), mask=inside)
    tl.store(row_start + slot, 0, mask=slot == 0)
    base = tl.load(at + BASE, mask=inside, other=0)
    tl.store(first_position + slot, tl.where(fits, base + valid, 0), mask=inside)


@triton.jit
def _worth_their_rows(
    rates: tl.tensor, at: tl.tensor, slot: tl.tensor, by_rates: tl.tensor, available: tl.tensor, sequences: tl.tensor,
    knee: tl.tensor,
) -> tl.tensor:  # fmt: skip
    run = tl.load(rates + slot * RATES + 2, mask=by_rates, other=0.0)
    first = tl.load(rates + slot * RATES, mask=by_rates, other=0.0)
    chance = tl.where(tl.load(at + IN_RUN, mask=by_rates, other=0) > 0, run, first)
    tokens = tl.full(chance.shape, 1.0, tl.float32)
    count = tl.zeros(chance.shape, tl.int32)
    going = by_rates
    for guess in range(tl.minimum(tl.max(available, 0), MOST_GUESSES)):
        going = going & (guess < available) & (chance * (knee + sequences * (guess + 1)) >= sequences * tokens)
        count += going.to(tl.int32)
        tokens += chance
        chance *= run
    return count


@triton.jit(do_not_specialize=["slots", "size", "places", "pages"])
def rows_kernel(
    fields: tl.tensor, text: tl.tensor, block_table: tl.tensor, token_ids: tl.tensor, positions: tl.tensor,
    kv_slots: tl.tensor, row_start: tl.tensor, first_position: tl.tensor, slots: tl.tensor, size: tl.tensor,
    places: tl.tensor, pages: tl.tensor, slot_temperature: tl.tensor, slot_seeds: tl.tensor, temperature: tl.tensor,
    seeds: tl.tensor, drawn_positions: tl.tensor, NOISE: tl.constexpr, SEARCH: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Token, position and K/V slot of a block of rows; with NOISE also what their predictions are drawn with."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    owner = tl.zeros((BLOCK,), tl.int32)  # the last slot that starts at the row or before it
    for bit in tl.static_range(SEARCH):
        higher = owner + (1 << (SEARCH - 1 - bit))
        start = tl.load(row_start + higher, mask=higher <= slots, other=2147483647)
        owner = tl.where(start <= row, higher, owner)
    inside = row < size
    owned = inside & (owner < slots)
    offset = row - tl.load(row_start + owner, mask=owned, other=0)
    position = tl.load(first_position + owner, mask=owned, other=0) + offset
    place = tl.load(fields + owner * WIDTH + VALID, mask=owned, other=0) + offset
    wide = owner.to(tl.int64)
    token = tl.load(text + wide * places + place, mask=owned, other=0)
    page = tl.load(block_table + wide * pages + position // PAGE_SIZE, mask=owned, other=0).to(tl.int64)
    tl.store(token_ids + row, token.to(tl.int64), mask=inside)
    tl.store(positions + row, tl.where(owned, position, 0).to(tl.int64), mask=inside)
    tl.store(kv_slots + row, tl.where(owned, page * PAGE_SIZE + position % PAGE_SIZE, -1), mask=inside)
    if NOISE:
        tl.store(temperature + row, tl.load(slot_temperature + owner, mask=owned, other=0.0), mask=inside)
        tl.store(seeds + row, tl.load(slot_seeds + owner, mask=owned, other=0), mask=inside)
        tl.store(drawn_positions + row, tl.where(owned, place, 0).to(tl.int64), mask=inside)
