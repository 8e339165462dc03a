"""What a Jacobi step's predictions make final, and what is guessed next, decided on the device."""

import torch
from torch import Tensor

from engine.kernels.jacobi_state import (
    DECAY,
    LENGTH_UNIT,
    LONGEST_MATCH,
    MOST_GUESSES,
    NEARBY,
    Field,
    JacobiState,
    Phase,
    Rate,
)
from engine.kernels.native import Impl
from engine.kernels.triton_choice import choose_triton


def jacobi_accept(
    state: JacobiState, predictions: Tensor, row_start: Tensor, eos: Tensor, *, impl: Impl = "auto"
) -> None:
    """Moves every slot that fed rows by one step, as engine/jacobi.py moves one sequence.

    predictions [t] int64 (-1: a row of NaN) of the rows that ``jacobi_pack`` wrote, row_start [slots + 1] int32, eos [e]
    int32, e >= 1 (-1 for none). Predictions are final up to and including the first that differs from the guess fed behind
    it; the others are the next guesses. A slot whose final tokens hold an EOS or reach its limit ends; one that is out of
    steps for its block takes the iterate as it is. Where the guess at the place behind was wrong or absent, and REALIGN is
    set, what follows the newest final tokens in the draft (the longest match, of these the nearest to EXPECTED), else in
    the last iterate given up, else in the answer (the latest match), becomes the guess.
    """
    slots = state.fields.shape[0]
    supported = row_start.shape == (slots + 1,) and predictions.dim() == 1 and eos.numel() > 0
    if choose_triton(
        impl, state.text, supported, "predictions [t], row_start [slots + 1] and at least one EOS id or -1"
    ):
        from engine.kernels.gpu.jacobi_accept import accept

        with torch.cuda.device_of(state.text):  # Triton launches on the current device
            accept(state, predictions, row_start, eos)
        return
    if impl == "cpp":
        raise ValueError('impl="cpp" cannot run here: there is no C++ kernel; use impl="auto" or impl="torch"')
    _reference(state, predictions, row_start, eos)


def _reference(state: JacobiState, predictions: Tensor, row_start: Tensor, eos: Tensor) -> None:
    moved = row_start.diff() > 0
    places = torch.arange(state.text.shape[1], device=moved.device)
    known, planned = state[Field.KNOWN].clone(), state[Field.PLANNED]
    last = known + planned
    row = (row_start[:-1] - state[Field.VALID])[:, None] + places - 1
    predicted = predictions[row.clamp(0, predictions.shape[0] - 1)].int()
    fresh = moved[:, None] & (places >= known[:, None]) & (places <= last[:, None])
    wrong = fresh & (places < last[:, None]) & (predicted != state.text)
    miss = torch.where(wrong, places, last[:, None]).amin(1).int()
    found = _at(predicted, miss)
    broken = moved & (found < 0)
    aligned = (miss == last) & (miss < state[Field.GUESSED]) & (_at(state.text, miss) == found)
    checked = miss < torch.maximum(state[Field.GUESSED], last)
    _observe(state, moved, miss - known + aligned, checked & ~aligned)

    state.text.copy_(torch.where(fresh, predicted.clamp_min(0), state.text))
    _set(state, Field.VALID, moved, miss)
    _set(state, Field.KNOWN, moved, miss + ~broken)
    _set(state, Field.GUESSED, moved, torch.maximum(state[Field.GUESSED], last + 1))
    _set(state, Field.STEPS, moved, state[Field.STEPS] + 1)
    _set(state, Field.ROWS, moved, state[Field.ROWS] + row_start.diff())
    _set(state, Field.BLOCK_STEPS, moved, state[Field.BLOCK_STEPS] + 1)
    _set(state, Field.EXPECTED, moved, state[Field.EXPECTED] + miss + 1 - known)
    _set(state, Field.PHASE, broken, torch.full_like(miss, Phase.NAN))
    is_eos = torch.isin(state.text, eos)
    end = torch.where(fresh & is_eos, places, places.numel()).amin(1).int()
    _realign(state, moved & ~broken & ~aligned & (state[Field.REALIGN] > 0), last)
    _finish(state, moved & ~broken, end)
    _foresee(state, moved, eos)


def _set(state: JacobiState, field: Field, where: Tensor, value: Tensor) -> None:
    state[field].copy_(torch.where(where, value, state[field]))


def _at(tokens: Tensor, place: Tensor) -> Tensor:
    """tokens [slots, places] at one place of each slot [slots]; any where there is no such place."""
    return tokens.gather(1, place.long().clamp(0, tokens.shape[1] - 1)[:, None])[:, 0]


def _observe(state: JacobiState, moved: Tensor, hits: Tensor, miss: Tensor) -> None:
    """WindowPolicy.observe: ``hits`` [slots] guesses were right, then one was wrong where ``miss`` [slots] is set."""
    in_run = state[Field.IN_RUN] > 0
    starts = moved & ~in_run & ((hits > 0) | miss)
    _update(state, Rate.FIRST, starts & (hits > 0), 1.0)
    _update(state, Rate.FIRST, starts & (hits == 0), 0.0)
    goes_on = moved & (in_run | (hits > 0))
    _update(state, Rate.RUN, torch.where(goes_on, hits - starts.int(), 0), 1.0)
    _update(state, Rate.RUN, goes_on & miss, 0.0)
    _set(state, Field.IN_RUN, moved, ((in_run | (hits > 0)) & ~miss).int())


def _update(state: JacobiState, rate: Rate, count: Tensor, outcome: float) -> None:
    value, weight = state.rates[:, rate], state.rates[:, rate + 1]
    faded = DECAY ** count.float()
    fresh = (1 - faded) / (1 - DECAY)
    kept = weight * faded
    value.copy_(torch.where(count > 0, (value * kept + outcome * fresh) / (kept + fresh), value))
    weight.copy_(torch.where(count > 0, kept + fresh, weight))


def _realign(state: JacobiState, wanted: Tensor, last: Tensor) -> None:
    """Guesses behind the final places of the ``wanted`` slots from where their newest tokens stood before."""
    known, expected, places = state[Field.KNOWN], state[Field.EXPECTED], state.text.shape[1]
    answer = state.text[:, 1:]
    sources = (
        (state.draft, state[Field.DRAFT], expected),
        (state.iterate, state[Field.ITERATE], None),
        (answer, known - 1, None),
    )
    at = torch.arange(places, device=known.device)
    missing, text, guessed = wanted, state.text.clone(), state[Field.GUESSED].clone()
    for source, length, place in sources:
        match = _best_match(source, length, answer, known - 1, place)
        found = missing & (match > 0)
        if place is not None:
            _set(state, Field.EXPECTED, found, match)
        end = torch.minimum(known + length - match, state[Field.LIMIT])
        proposed = source.gather(1, (at + (match - known)[:, None]).clamp(0, source.shape[1] - 1))
        replaced = found[:, None] & (at >= known[:, None]) & (at < end[:, None])
        text = torch.where(replaced, proposed, text)
        guessed = torch.where(found, torch.maximum(guessed, end), guessed)
        missing = missing & ~found
    tail = last + 1 - known
    given_up = state.text.gather(1, (at + known[:, None]).clamp_max(places - 1))
    kept = wanted & (tail > 1)
    state.iterate.copy_(torch.where(kept[:, None] & (at < tail[:, None]), given_up, state.iterate))
    _set(state, Field.ITERATE, kept, tail)
    _set(state, Field.IN_RUN, wanted, torch.zeros_like(known))
    state.text.copy_(text)
    state[Field.GUESSED].copy_(guessed)


def _best_match(source: Tensor, length: Tensor, answer: Tensor, count: Tensor, expected: Tensor | None) -> Tensor:
    """Place [slots] in ``source`` [slots, n] behind the best match of the end of answer[:count]; 0: there is none.

    The longest match of at least two tokens counts; of equally long ones the nearest to ``expected``, or the last. Near
    ``expected`` one token is enough.
    """
    place = torch.arange(source.shape[1], device=source.device)
    run = (place > 0) & (place < length[:, None])
    matched = torch.zeros_like(run, dtype=torch.int32)
    for i in range(LONGEST_MATCH):
        context = _at(answer, count - 1 - i)[:, None]
        run = run & (place > i) & (count[:, None] > i) & (source.roll(i + 1, 1) == context)
        matched = matched + run
    if expected is None:
        score = torch.where(matched >= 2, matched * LENGTH_UNIT + place, 0)
    else:
        away = place - expected[:, None]
        # at equal distance two tokens match rather before the place expected, one rather behind it
        second = torch.where(matched >= 2, away > 0, away < 0)
        near = (matched >= 2) | ((matched == 1) & (away.abs() <= NEARBY))
        score = torch.where(near, matched * LENGTH_UNIT - 2 * away.abs() - second.int(), 0)
    best = score.amax(1)
    return torch.where((score == best[:, None]) & (score > 0), place, 0).amax(1).int()


def _finish(state: JacobiState, moved: Tensor, end: Tensor) -> None:
    """Ends sequences and blocks; ``end`` [slots]: the first place with a fresh EOS, if any."""
    known, limit, block_end = state[Field.KNOWN], state[Field.LIMIT], state[Field.BLOCK_END]
    at_eos = moved & (end < known)
    at_limit = moved & ~at_eos & (known >= limit)
    stepping = moved & ~at_eos & ~at_limit & (state[Field.STEP_LIMIT] > 0)
    out = stepping & (known < block_end) & (state[Field.BLOCK_STEPS] >= state[Field.STEP_LIMIT])
    cut = at_eos | (out & (end < block_end))
    stop = out & ((end < block_end) | (block_end >= limit))
    next_block = stepping & ~stop & (out | (known >= block_end))
    for where, phase in ((at_eos, Phase.EOS), (at_limit, Phase.LENGTH), (stop, Phase.STEPS)):
        _set(state, Field.PHASE, where, torch.full_like(known, phase))
    _set(state, Field.KNOWN, out, block_end)
    _set(state, Field.KNOWN, cut, end + 1)
    _set(state, Field.CONVERGED, out, torch.zeros_like(known))
    _set(state, Field.BLOCK_END, next_block, torch.minimum(block_end + state[Field.BLOCK_SIZE], limit))
    _set(state, Field.BLOCK_STEPS, next_block, torch.zeros_like(known))


def _foresee(state: JacobiState, moved: Tensor, eos: Tensor) -> None:
    """MAY_END of the step that comes."""
    known, window = state[Field.KNOWN], state[Field.WINDOW]
    guesses = torch.where(window > 0, window - 1, (state[Field.GUESSED] - known).clamp_max(MOST_GUESSES))
    reach = torch.where(state[Field.STEP_LIMIT] > 0, state[Field.BLOCK_END], known + guesses + 1)
    place = torch.arange(state.text.shape[1], device=known.device)
    ahead = (place >= known[:, None]) & (place < reach[:, None]) & torch.isin(state.text, eos)
    _set(state, Field.MAY_END, moved, ((reach >= state[Field.LIMIT]) | ahead.any(1)).int())
