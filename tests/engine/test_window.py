"""How many guesses are worth a row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.roofline import Roofline, measured
from engine.window import CPU_KNEE_ROWS, KNEE_LIMITS, MOST_GUESSES, WindowPolicy, bounded_knee, knee_rows


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


def test_ceilings_can_be_measured_anywhere() -> None:
    found = measured(torch.device("cpu"), torch.float32, copied=1 << 20, size=64)
    assert 1e6 < found.bytes_per_second < 1e13
    assert 1e6 < found.flops_per_second < 1e14
