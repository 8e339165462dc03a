"""How many guesses are worth a row."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import RefineOptions, Refiner, Request, device_loop, refiner, roofline, window
from engine.roofline import Roofline, measured
from engine.window import CPU_KNEE_ROWS, KNEE_LIMITS, MOST_GUESSES, WindowPolicy, bounded_knee, knee_rows
from tests.engine.test_device_loop import VOCABULARY, Ledger, start


def trained(hits: int, miss: bool, times: int = 40, knee: int = 11) -> WindowPolicy:
    policy = WindowPolicy(knee)
    for _ in range(times):
        policy.observe(hits, miss)
    return policy


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=30), st.integers(0, 400), st.integers(1, 64),
    st.integers(1, 300),
)  # fmt: skip
def test_bounds(seen: list[tuple[int, bool]], available: int, sequences: int, knee: int) -> None:
    policy = WindowPolicy(knee)
    for hits, miss in seen:
        policy.observe(hits, miss)
        assert 0 <= policy.first.value <= 1
        assert 0 <= policy.run.value <= 1
    count = policy.guesses(available, sequences)
    assert 0 <= count <= min(available, MOST_GUESSES)
    assert policy.guesses(available + 1, sequences) >= count
    assert policy.guesses(available, sequences + 1) <= count


def test_follows_what_it_sees() -> None:
    assert trained(0, True).guesses(100, 1) <= 1
    assert trained(50, False).guesses(100, 1) > 60
    assert trained(3, True).guesses(100, 1) < trained(30, True).guesses(100, 1)
    policy = trained(0, True)
    for _ in range(10):
        policy.observe(50, False)
    assert policy.guesses(100, 1) > 30


def test_a_larger_batch_leaves_less_room() -> None:
    assert trained(5, True).guesses(100, 64) < trained(5, True).guesses(100, 1)
    assert trained(5, True, knee=200).guesses(100, 1) > trained(5, True, knee=11).guesses(100, 1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_knee_without_a_gpu(device: str) -> None:
    assert knee_rows(torch.device(device), torch.float32) == CPU_KNEE_ROWS


@pytest.mark.parametrize(
    ("flops", "dtype", "rows"),
    [
        (790e12, torch.bfloat16, 180),  # an H200: 790 TFLOP/s over 4.4 TB/s
        (50e12, torch.float32, 23),
        (1e12, torch.bfloat16, KNEE_LIMITS[0]),
        (1e18, torch.bfloat16, KNEE_LIMITS[1]),
    ],
)
def test_knee_is_where_arithmetic_and_reading_are_even(flops: float, dtype: torch.dtype, rows: int) -> None:
    assert bounded_knee(Roofline(4.4e12, flops), dtype) == rows


@pytest.mark.parametrize(("flops", "rows"), [(90e12, 90), (333e12, 333)])
def test_knee_of_a_gpu_is_the_measured_one(flops: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:1")
    monkeypatch.setattr(window, "measured", lambda *given: {(device, torch.bfloat16): Roofline(1e12, flops)}[given])
    assert knee_rows(device, torch.bfloat16) == rows


@pytest.mark.parametrize(("dtype", "rows"), [(torch.bfloat16, 153), (torch.float16, 153), (torch.float32, 19)])
def test_knee_of_a_gpu_without_memory_to_measure(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*given: object) -> Roofline:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(window, "measured", full)
    assert knee_rows(torch.device("cuda"), dtype) == rows
    assert "no memory is left to measure cuda" in caplog.text


def test_the_knee_reaches_whoever_moves_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known before the cache, which may take what memory is left; on the device, rows are chosen by it."""
    model, order, packed = Ledger(), [], []
    new_cache, pack = model.new_cache, device_loop.jacobi_pack
    monkeypatch.setenv("DIFFPO_LOOP", "device")
    monkeypatch.setattr(refiner, "knee_rows", lambda *given: order.append("knee") or 37)
    monkeypatch.setattr(model, "new_cache", lambda pages: [order.append("cache"), new_cache(pages)][1])
    monkeypatch.setattr(
        device_loop,
        "jacobi_pack",
        lambda state, rows, knee, noise: [packed.append(knee), pack(state, rows, knee, noise)],
    )
    with Refiner(model, VOCABULARY, max_batch_tokens=64, kv_cache_tokens=640) as found:
        assert order == ["knee", "cache"]
        scheduler = found._scheduler
        assert scheduler is not None
        assert scheduler.loop is not None
        found.refine([{"prompt_ids": [2, 3, 4]}])
        assert set(packed) == {37}
        scheduler.loop._occupants[0] = device_loop._Occupant(start([5], []), 1, 1, 20, False)
        assert scheduler.loop._room() == 64  # twice 20, but no more than 37, is above 32
        assert found._sequence(Request(prompt_ids=[2, 3]), RefineOptions()).policy.knee == 37


def test_measuring_leaves_the_processs_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    measured(torch.device("cpu"), torch.float32, copied=1 << 10, size=8)
    assert torch.equal(torch.get_rng_state(), before)


def test_measuring_waits_for_its_own_events_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the device would spoil what another thread captures there."""
    log: list[object] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None:
            log.append(self)

        def synchronize(self) -> None:
            log.append("wait")
            assert log[-2] is self

        def elapsed_time(self, other: "Event") -> float:
            assert log[-1] == "wait"
            return float(log.index(other) - log.index(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.delattr(torch.cuda, "synchronize")
    assert roofline._seconds(lambda: None, torch.device("cuda:1")) == 1e-3
    assert len(log) == roofline.ROUNDS + 2


def test_ceilings_can_be_measured_anywhere() -> None:
    found = measured(torch.device("cpu"), torch.float32, copied=1 << 20, size=64)
    assert 1e6 < found.bytes_per_second < 1e13
    assert 1e6 < found.flops_per_second < 1e14
