"""Triton kernel of ``jacobi_accept``: one program per slot, which ends at once where nothing was fed.

Everything is decided from what the step found in memory, before the program writes anything: places below ``known`` are
read from the text, those the step predicted from the predictions. Only what is written last waits for the writes before it.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import jacobi_state
from engine.kernels.gpu.jacobi_fields import (
    BLOCK_END,
    BLOCK_SIZE,
    BLOCK_STEPS,
    CONVERGED,
    DRAFT,
    EOS,
    EXPECTED,
    GUESSED,
    IN_RUN,
    ITERATE,
    KNOWN,
    LENGTH,
    LENGTH_UNIT,
    LIMIT,
    LONGEST_MATCH,
    MAY_END,
    MOST_GUESSES,
    NAN,
    NEARBY,
    OUT_OF_STEPS,
    PHASE,
    PLANNED,
    RATES,
    REALIGN,
    ROWS,
    STEP_LIMIT,
    STEPS,
    VALID,
    WIDTH,
    WINDOW,
)
from engine.kernels.jacobi_state import JacobiState

LOG2_DECAY = tl.constexpr(math.log2(jacobi_state.DECAY))
SETTLED = tl.constexpr(1 / (1 - jacobi_state.DECAY))  # the weight of endlessly many observations
# one place per thread: what more would take is spilled on sm_80 or sm_90 by one version or another
BLOCK, WARPS = 256, 8


def accept(state: JacobiState, predictions: Tensor, row_start: Tensor, eos: Tensor) -> None:
    """See engine.kernels.jacobi_accept."""
    accept_kernel[(state.fields.shape[0],)](
        state.fields, state.rates, state.text, state.draft, state.iterate, predictions, row_start, eos, eos.numel(),
        state.text.shape[1], BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["eos_count", "places"])
def accept_kernel(
    fields: tl.tensor, rates: tl.tensor, text: tl.tensor, draft: tl.tensor, iterate: tl.tensor, predictions: tl.tensor,
    row_start: tl.tensor, eos: tl.tensor, eos_count: tl.tensor, places: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """As ``_reference`` of engine.kernels.jacobi_accept."""
    slot = tl.program_id(0)
    first_row = tl.load(row_start + slot)
    rows = tl.load(row_start + slot + 1) - first_row
    if rows > 0:
        at, offset = fields + slot * WIDTH, slot.to(tl.int64) * places
        text, draft, iterate = text + offset, draft + offset, iterate + offset
        known, guessed = tl.load(at + KNOWN), tl.load(at + GUESSED)
        last = known + tl.load(at + PLANNED)
        predicted = predictions + (first_row - 1 - tl.load(at + VALID))  # indexed by place
        miss, end = _first_miss_and_eos(text, predicted, known, last, places, eos, eos_count, BLOCK)
        found = tl.load(predicted + miss).to(tl.int32)
        broken = found < 0
        aligned = (miss == last) & (miss < guessed) & (tl.load(text + miss) == found)
        missed = (miss < tl.maximum(guessed, last)) & (aligned == 0)
        in_run = _observe(rates + slot * RATES, tl.load(at + IN_RUN), miss - known + aligned.to(tl.int32), missed)
        guessed = tl.maximum(guessed, last + 1)
        fresh_end, limit = miss + 1, tl.load(at + LIMIT)
        expected = tl.load(at + EXPECTED) + fresh_end - known
        tail = last + 1 - fresh_end

        realign = (tl.load(at + REALIGN) > 0) & (broken == 0) & (aligned == 0)
        source, match, length = last * 0, last * 0, last * 0
        if realign:
            source, match, length = _search(
                draft, tl.load(at + DRAFT), iterate, tl.load(at + ITERATE), text, predicted, known, fresh_end,
                expected, BLOCK,
            )  # fmt: skip
        proposed_end = tl.where(source > 0, tl.minimum(fresh_end + length - match, limit), 0)
        guessed = tl.maximum(guessed, proposed_end)
        final, phase, block_end, block_steps, converged = _finished(at, tl.where(broken, miss, fresh_end), end, broken)
        guesses = tl.where(
            tl.load(at + WINDOW) > 0, tl.load(at + WINDOW) - 1, tl.minimum(guessed - final, MOST_GUESSES)
        )
        reach = tl.where(tl.load(at + STEP_LIMIT) > 0, block_end, final + guesses + 1)
        steps, rows = tl.load(at + STEPS) + 1, tl.load(at + ROWS) + rows

        tl.debug_barrier()  # from here on what was read is written
        _write_guesses(text, predicted, draft, iterate, known, fresh_end, last, proposed_end, source, match, BLOCK)
        tl.store(at + PHASE, phase)
        tl.store(at + KNOWN, final)
        tl.store(at + VALID, miss)
        tl.store(at + GUESSED, guessed)
        tl.store(at + STEPS, steps)
        tl.store(at + ROWS, rows)
        tl.store(at + CONVERGED, converged)
        tl.store(at + IN_RUN, tl.where(realign, 0, in_run))
        tl.store(at + BLOCK_END, block_end)
        tl.store(at + BLOCK_STEPS, block_steps)
        tl.store(at + EXPECTED, tl.where(source == 1, match, expected))
        tl.debug_barrier()  # the last iterate was read, the text is written
        if realign & (tail > 1):
            _write_iterate(iterate, predicted + fresh_end, tail, BLOCK)
            tl.store(at + ITERATE, tail)
        ahead = _holds_eos(text, final, tl.minimum(reach, limit), eos, eos_count, BLOCK)
        tl.store(at + MAY_END, tl.maximum(ahead, (reach >= limit).to(tl.int32)))


@triton.jit
def _is_eos(tokens: tl.tensor, eos: tl.tensor, eos_count: tl.tensor) -> tl.tensor:
    hit = tokens != tokens
    for i in range(eos_count):
        hit = hit | (tokens == tl.load(eos + i))
    return hit


@triton.jit
def _first_miss_and_eos(
    text: tl.tensor, predicted: tl.tensor, known: tl.tensor, last: tl.tensor, places: tl.tensor, eos: tl.tensor,
    eos_count: tl.tensor, BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """The first place whose guess is not what is predicted there, or the last; the first predicted EOS, or ``places``."""
    miss, end = last, places
    for start in range(known, last + 1, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place <= last
        token = tl.load(predicted + place, mask=inside, other=0).to(tl.int32)
        guess = tl.load(text + place, mask=place < last, other=0)
        miss = tl.minimum(miss, tl.min(tl.where((place < last) & (token != guess), place, last), 0))
        stop = inside & _is_eos(tl.maximum(token, 0), eos, eos_count)
        end = tl.minimum(end, tl.min(tl.where(stop, place, places), 0))
    return miss, end


@triton.jit
def _updated(
    value: tl.tensor, weight: tl.tensor, count: tl.tensor, outcome: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    faded = tl.exp2(count.to(tl.float32) * LOG2_DECAY)
    fresh, kept = (1.0 - faded) * SETTLED, weight * faded
    value = tl.where(count > 0, (value * kept + outcome * fresh) / (kept + fresh), value)
    return value, tl.where(count > 0, kept + fresh, weight)


@triton.jit
def _observe(rates: tl.tensor, in_run: tl.tensor, hits: tl.tensor, missed: tl.tensor) -> tl.tensor:
    """Updates the rates by ``hits`` right guesses and a wrong one behind them, if ``missed``; the new ``in_run``."""
    starts = (in_run == 0) & ((hits > 0) | missed)
    goes_on = (in_run > 0) | (hits > 0)
    first, first_weight = tl.load(rates), tl.load(rates + 1)
    first, first_weight = _updated(first, first_weight, (starts & (hits > 0)).to(tl.int32), 1.0)
    first, first_weight = _updated(first, first_weight, (starts & (hits == 0)).to(tl.int32), 0.0)
    run, run_weight = tl.load(rates + 2), tl.load(rates + 3)
    run, run_weight = _updated(run, run_weight, tl.where(goes_on, hits - starts.to(tl.int32), 0), 1.0)
    run, run_weight = _updated(run, run_weight, (goes_on & missed).to(tl.int32), 0.0)
    tl.store(rates, first)
    tl.store(rates + 1, first_weight)
    tl.store(rates + 2, run)
    tl.store(rates + 3, run_weight)
    return (goes_on & (missed == 0)).to(tl.int32)


@triton.jit
def _final_at(text: tl.tensor, predicted: tl.tensor, known: tl.tensor, place: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Final tokens, of the text or of this step; -1 where the mask is off."""
    old = tl.load(text + place, mask=mask & (place < known), other=-1)
    return tl.where(place < known, old, tl.load(predicted + place, mask=mask & (place >= known), other=-1).to(tl.int32))


@triton.jit
def _best_match(
    source: tl.tensor, length: tl.tensor, text: tl.tensor, predicted: tl.tensor, known: tl.tensor,
    fresh_end: tl.tensor, expected: tl.tensor, NEAR: tl.constexpr, ANSWER: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Index behind the best match of the newest final tokens in ``source``, or in the ANSWER itself; 0: there is none."""
    best, found = 0, 0
    for start in range(1, length, BLOCK):
        place = start + tl.arange(0, BLOCK)
        run = place < length
        matched = tl.zeros((BLOCK,), tl.int32)
        for i in tl.static_range(LONGEST_MATCH):
            newest, before = fresh_end - 1 - i, place - 1 - i
            run = run & (before >= tl.where(newest >= 1, 0, length))  # place 0 is no part of the answer
            if ANSWER:
                token = _final_at(text, predicted, known, before + 1, run)
            else:
                token = tl.load(source + before, mask=run, other=-1)
            newest = tl.maximum(newest, 1) + tl.zeros((BLOCK,), tl.int32)
            run = run & (token == _final_at(text, predicted, known, newest, run))
            matched += run.to(tl.int32)
        if NEAR:
            away = place - expected
            distance = tl.abs(away)
            second = tl.where(matched >= 2, away > 0, away < 0).to(tl.int32)
            near = (matched >= 2) | ((matched == 1) & (distance <= NEARBY))
            score = tl.where(near, matched * LENGTH_UNIT - 2 * distance - second, 0)
        else:
            score = tl.where(matched >= 2, matched * LENGTH_UNIT + place, 0)
        top = tl.max(score, 0)
        here = tl.max(tl.where(score == top, place, 0), 0)
        found = tl.where(top > best, here, found)
        best = tl.maximum(best, top)
    return found


@triton.jit
def _search(
    draft: tl.tensor, drafted: tl.tensor, iterate: tl.tensor, iterated: tl.tensor, text: tl.tensor,
    predicted: tl.tensor, known: tl.tensor, fresh_end: tl.tensor, expected: tl.tensor, BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Where the answer goes on: in the draft (1), the last iterate (2), the answer itself (3) or nowhere (0); the index
    there and the source's length."""
    source, length = 1, drafted
    match = _best_match(draft, drafted, text, predicted, known, fresh_end, expected, True, False, BLOCK)
    if match == 0:
        source, length = 2, iterated
        match = _best_match(iterate, iterated, text, predicted, known, fresh_end, expected, False, False, BLOCK)
    if match == 0:
        source, length = 3, fresh_end - 1
        match = _best_match(text, fresh_end - 1, text, predicted, known, fresh_end, expected, False, True, BLOCK)
    return tl.where(match > 0, source, 0), match, length


@triton.jit
def _write_guesses(
    text: tl.tensor, predicted: tl.tensor, draft: tl.tensor, iterate: tl.tensor, known: tl.tensor,
    fresh_end: tl.tensor, last: tl.tensor, proposed_end: tl.tensor, source: tl.tensor, match: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """The predictions from ``known`` on, and over those behind ``fresh_end`` what was proposed."""
    draft_end = tl.where(source == 1, proposed_end, 0)
    iterate_end = tl.where(source == 2, proposed_end, 0)
    answer_end = tl.where(source == 3, proposed_end, 0)
    for start in range(known, tl.maximum(last + 1, proposed_end), BLOCK):
        place = start + tl.arange(0, BLOCK)
        token = tl.maximum(tl.load(predicted + place, mask=place <= last, other=0).to(tl.int32), 0)
        behind, index = place >= fresh_end, match + place - fresh_end
        drafted, iterated, answered = (
            behind & (place < draft_end), behind & (place < iterate_end), behind & (place < answer_end),
        )  # fmt: skip
        token = tl.where(drafted, tl.load(draft + index, mask=drafted, other=0), token)
        token = tl.where(iterated, tl.load(iterate + index, mask=iterated, other=0), token)
        token = tl.where(answered, _final_at(text, predicted, known, index + 1, answered), token)
        tl.store(text + place, token, mask=(place <= last) | (behind & (place < proposed_end)))


@triton.jit
def _write_iterate(iterate: tl.tensor, tokens: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        token = tl.load(tokens + i, mask=i < count, other=0).to(tl.int32)
        tl.store(iterate + i, tl.maximum(token, 0), mask=i < count)


@triton.jit
def _finished(
    at: tl.tensor, known: tl.tensor, end: tl.tensor, broken: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Ends sequence or block: how much is final, PHASE, BLOCK_END, BLOCK_STEPS and CONVERGED."""
    limit, step_limit = tl.load(at + LIMIT), tl.load(at + STEP_LIMIT)
    block_end, block_steps = tl.load(at + BLOCK_END), tl.load(at + BLOCK_STEPS) + 1
    at_eos = (broken == 0) & (end < known)
    at_limit = (broken == 0) & (at_eos == 0) & (known >= limit)
    stepping = (broken == 0) & (at_eos == 0) & (at_limit == 0) & (step_limit > 0)
    out = stepping & (known < block_end) & (block_steps >= step_limit)
    stop = out & ((end < block_end) | (block_end >= limit))
    next_block = stepping & (stop == 0) & (out | (known >= block_end))
    phase = tl.where(at_eos, EOS, tl.where(at_limit, LENGTH, tl.where(stop, OUT_OF_STEPS, tl.load(at + PHASE))))
    known = tl.where(at_eos | (out & (end < block_end)), end + 1, tl.where(out, block_end, known))
    next_end = tl.minimum(block_end + tl.load(at + BLOCK_SIZE), limit)
    return (
        known,
        tl.where(broken, NAN, phase),
        tl.where(next_block, next_end, block_end),
        tl.where(next_block, 0, block_steps),
        tl.where(out, 0, tl.load(at + CONVERGED)),
    )


@triton.jit
def _holds_eos(
    text: tl.tensor, start: tl.tensor, stop: tl.tensor, eos: tl.tensor, eos_count: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """Whether there is an EOS at places start .. stop."""
    found = start * 0
    for first in range(start, stop, BLOCK):
        place = first + tl.arange(0, BLOCK)
        token = tl.load(text + place, mask=place < stop, other=0)
        hit = (place < stop) & _is_eos(token, eos, eos_count)
        found = tl.maximum(found, tl.max(hit.to(tl.int32), 0))
    return found
