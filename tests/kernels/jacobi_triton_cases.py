"""The Triton kernels of ``jacobi_pack`` and ``jacobi_accept`` against their references, on a GPU or in the interpreter.

Not collected by default: test_triton_interpreter.py runs this file in a process of its own, bench/gpu.sh as it is.
"""

import os
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from engine.kernels import Field, JacobiState, NoiseRows, PackedRows, Phase, Rate, jacobi_accept, jacobi_pack
from engine.kernels.jacobi_state import LONGEST_TEXT

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
Rows = TypeVar("Rows", PackedRows, NoiseRows)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
WORDS, EOS = 5, 3  # few words: guesses are often right and texts repeat

if INTERPRETED:
    from tests.kernels.triton_interpreter import repair

    repair()


def random_state(seed: int, slots: int, places: int) -> JacobiState:
    """Slots in the middle of their work: running with every kind of option, ended, empty. Unused tokens are poisoned."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=g))

    state = JacobiState.allocate(slots, places, -(-(places + 70) // 32), torch.device("cpu"))
    for tensor in (state.text, state.draft, state.iterate, state.block_table):
        tensor.fill_(2**31 - 1)
    for slot in range(slots):
        f = dict.fromkeys(Field, 0)
        f[Field.PHASE] = draw(0, 5) if draw(0, 3) == 0 else Phase.RUNNING
        f[Field.LIMIT] = limit = draw(2, places)
        f[Field.KNOWN] = known = draw(1, limit - 1)
        f[Field.VALID] = known - 1
        f[Field.GUESSED] = draw(known, limit)
        f[Field.BASE] = draw(0, 70)
        f[Field.CONVERGED], f[Field.STEPS], f[Field.ROWS] = 1, draw(0, 9), draw(0, 99)
        f[Field.DRAFT], f[Field.ITERATE] = draw(0, limit - 1), draw(0, limit - 1)
        f[Field.EXPECTED], f[Field.IN_RUN] = draw(0, limit - 1), draw(0, 1)
        f[Field.REALIGN] = draw(0, 1)
        f[Field.WINDOW] = draw(0, 1) * draw(1, places)
        f[Field.CONCURRENCY] = draw(0, 9) if draw(0, 4) == 0 else 0
        if draw(0, 3) == 0:
            f[Field.STEP_LIMIT], f[Field.BLOCK_SIZE], f[Field.REALIGN] = draw(1, 3), draw(1, places), 0
            f[Field.BLOCK_END] = draw(known + 1, limit)
            f[Field.BLOCK_STEPS], f[Field.VALID] = draw(0, f[Field.STEP_LIMIT] - 1), draw(0, known - 1)
        state.fields[slot] = torch.tensor([int(f[field]) for field in Field])
        value = torch.rand(len(Rate), generator=g)
        state.rates[slot] = value + torch.tensor([0.0, 1.0, 0.0, 1.0])
        token = torch.randint(0, WORDS, (3, places), generator=g, dtype=torch.int32)
        state.text[slot] = token[0].masked_fill(torch.arange(places) < known, 0) if draw(0, 4) == 0 else token[0]
        state.draft[slot, : f[Field.DRAFT]] = token[1, : f[Field.DRAFT]]
        state.iterate[slot, : f[Field.ITERATE]] = token[2, : f[Field.ITERATE]]
        pages = -(-(f[Field.BASE] + limit) // 32)
        state.block_table[slot, :pages] = torch.randint(0, 1 << 28, (pages,), generator=g, dtype=torch.int32)
        state.temperature[slot], state.seeds[slot] = draw(0, 3) / 2, 2**63 - 1 - draw(0, 2**40)
    return state


def copy(state: JacobiState) -> JacobiState:
    return JacobiState(*(getattr(state, name).to(DEVICE, copy=True) for name in JacobiState.__slots__))


def assert_same(one: JacobiState, other: JacobiState) -> None:
    for field in Field:
        assert torch.equal(one[field], other[field]), field.name
    # exp2 and powers differ in the last places of what is added up
    torch.testing.assert_close(one.rates, other.rates, rtol=1e-5, atol=1e-6)
    for name in ("text", "draft", "iterate", "block_table", "temperature", "seeds"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def poisoned_rows(size: int, slots: int) -> PackedRows:
    return poisoned(PackedRows.allocate(size, slots, DEVICE))


def poisoned(rows: Rows) -> Rows:
    for name in rows.__slots__:
        getattr(rows, name).fill_(-77)
    return rows


def predictions_for(state: JacobiState, rows: PackedRows, seed: int, right: float) -> Tensor:
    """Mostly what was guessed (with chance ``right``), now and then NaN."""
    g = torch.Generator().manual_seed(seed)
    size = rows.token_ids.shape[0]
    predicted = torch.randint(0, WORDS, (size,), generator=g)
    following = torch.cat((rows.token_ids[1:].cpu(), rows.token_ids[:1].cpu()))
    predicted = torch.where(torch.rand(size, generator=g) < right, following, predicted)
    predicted[torch.rand(size, generator=g) < 0.01] = -1
    return predicted.to(DEVICE)


SHAPES = [
    (1, 2, 1),
    (1, 9, 4),
    (3, 17, 40),
    (4, 40, 16),
    (8, 70, 128),
    (5, 600, 700),
    (13, 33, 100),
    (64, 40, 300),
    (2, LONGEST_TEXT, 500),
]
CASES = [(seed, *shape) for shape in SHAPES for seed in range(4)]


@pytest.mark.parametrize(("seed", "slots", "places", "size"), CASES)
def test_pack(seed: int, slots: int, places: int, size: int) -> None:
    state = random_state(seed, slots, places)
    expected, found = copy(state), copy(state)
    rows, plain = poisoned_rows(size, slots), poisoned_rows(size, slots)
    jacobi_pack(expected, plain, 11 + 60 * seed, impl="torch")
    jacobi_pack(found, rows, 11 + 60 * seed, impl="triton")
    assert_same(found, expected)
    for name in PackedRows.__slots__:
        assert torch.equal(getattr(rows, name), getattr(plain, name)), name


@pytest.mark.parametrize(("seed", "slots", "places", "size"), CASES)
def test_pack_with_noise(seed: int, slots: int, places: int, size: int) -> None:
    """The rows are the same ones; each has its slot's temperature and seed, and the position of what it predicts."""
    state = random_state(50 + seed, slots, places)
    plain, rows, noise = copy(state), poisoned_rows(size, slots), NoiseRows.allocate(size, DEVICE)
    jacobi_pack(plain, rows, 99, impl="torch")
    for slot in range(slots):
        own = slice(int(rows.row_start[slot]), int(rows.row_start[slot + 1]))
        noise.temperature[own], noise.seeds[own] = state.temperature[slot].item(), int(state.seeds[slot])
        noise.positions[own] = rows.positions[own] - int(state[Field.BASE][slot])
    for impl in ("torch", "triton"):
        moved, rows_found = copy(state), poisoned_rows(size, slots)
        found = poisoned(NoiseRows.allocate(size, DEVICE))
        jacobi_pack(moved, rows_found, 99, found, impl=impl)
        assert_same(moved, plain)
        for name in PackedRows.__slots__:
            assert torch.equal(getattr(rows_found, name), getattr(rows, name)), (impl, name)
        for name in NoiseRows.__slots__:
            assert torch.equal(getattr(found, name), getattr(noise, name)), (impl, name)


@pytest.mark.parametrize(("seed", "slots", "places", "size"), CASES)
def test_accept(seed: int, slots: int, places: int, size: int) -> None:
    state = copy(random_state(100 + seed, slots, places))
    rows = poisoned_rows(size, slots)
    jacobi_pack(state, rows, 200, impl="torch")
    predicted = predictions_for(state, rows, seed, right=(0.0, 0.6, 0.95, 1.0)[seed])
    eos = torch.tensor([[-1], [EOS], [EOS, 1], [EOS]][seed], dtype=torch.int32, device=DEVICE)
    expected, found = copy(state), copy(state)
    jacobi_accept(expected, predicted, rows.row_start, eos, impl="torch")
    jacobi_accept(found, predicted, rows.row_start, eos, impl="triton")
    assert_same(found, expected)


def test_many_steps() -> None:
    """Both implementations side by side until every slot has ended: all ends come up, and every source of guesses."""
    state, ended = copy(random_state(7, 24, 60)), set()
    found, rows = copy(state), poisoned_rows(600, 24)
    eos = torch.tensor([EOS], dtype=torch.int32, device=DEVICE)
    for step in range(60):
        jacobi_pack(state, rows, 50, impl="torch")
        jacobi_pack(found, rows, 50, impl="triton")
        predicted = predictions_for(state, rows, step, right=0.8)
        jacobi_accept(state, predicted, rows.row_start, eos, impl="torch")
        jacobi_accept(found, predicted, rows.row_start, eos, impl="triton")
        assert_same(found, state)
        found.rates.copy_(state.rates)  # or a rounding would in time change a window
        ended |= set(state[Field.PHASE].tolist())
        if not (state[Field.PHASE] == Phase.RUNNING).any():
            break
    assert ended >= set(Phase) - {Phase.EMPTY}
    assert not (state[Field.PHASE] == Phase.RUNNING).any()


def test_addresses_beyond_32_bits() -> None:
    """Slot and page times their sizes are formed in 64 bits."""
    slots, places = 2, LONGEST_TEXT
    state = copy(random_state(2, slots, places))
    state[Field.PHASE].fill_(Phase.RUNNING)
    state[Field.STEP_LIMIT].zero_()
    state[Field.CONCURRENCY].zero_()
    state[Field.VALID].copy_(state[Field.KNOWN] - 1)
    state.block_table.fill_(2**31 - 1)
    rows, plain = poisoned_rows(64, slots), poisoned_rows(64, slots)
    jacobi_pack(copy(state), plain, 200, impl="torch")
    jacobi_pack(state, rows, 200, impl="triton")
    assert torch.equal(rows.slots, plain.slots)
    assert int(rows.slots.max()) > 2**35


def test_refusals() -> None:
    state, rows = copy(random_state(0, 2, 9)), poisoned_rows(4, 3)
    with pytest.raises(ValueError, match="as many slots in rows as in state"):
        jacobi_pack(state, rows, 11, impl="triton")
    with pytest.raises(ValueError, match="noise needs an entry per row: got 5 for 4 rows"):
        jacobi_pack(state, poisoned_rows(4, 2), 11, NoiseRows.allocate(5, DEVICE))
    with pytest.raises(ValueError, match="at least one EOS"):
        jacobi_accept(state, rows.token_ids, rows.row_start, torch.empty(0, dtype=torch.int32), impl="triton")
    with pytest.raises(ValueError, match="no C"):
        jacobi_pack(state, poisoned_rows(4, 2), 11, impl="cpp")
