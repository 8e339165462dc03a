"""Intervals and win rates against enumeration, another optimiser, and data whose truth is known."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.evaluate import statistics
from engine.evaluate.statistics import (
    RIDGE,
    length_controlled_win_rate,
    paired_bootstrap,
    preferences,
    win_rate,
)

NUMBERS = st.floats(-1e3, 1e3)


def test_bounds_are_quantiles_of_all_resamples() -> None:
    values = [0.0, 1.0, 4.0, 9.0, 11.0]
    means = Counter(round(sum(chosen) / 5, 9) for chosen in product(values, repeat=5))
    total = sum(means.values())
    found = paired_bootstrap(values, draws=20000)
    assert found.mean == pytest.approx(5.0)
    for bound, share in ((found.low, 0.025), (found.high, 0.975)):
        below = sum(count for mean, count in means.items() if mean < bound - 1e-9) / total
        up_to = sum(count for mean, count in means.items() if mean <= bound + 1e-9) / total
        spread = 5 * np.sqrt(share * (1 - share) / 20000)  # of a share of 20,000 draws
        assert below - spread <= share <= up_to + spread


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    held = [
        found.low <= 0.3 <= found.high
        for found in (paired_bootstrap(rng.normal(0.3, 1, 40), draws=500, seed=i) for i in range(300))
    ]
    assert 0.88 < np.mean(held) < 0.98  # percentile intervals of 40 values are a little narrow


@given(st.lists(NUMBERS, min_size=1, max_size=30), st.integers(1, 5))
def test_repeated_cases_of_a_prompt_add_nothing(values: list[float], times: int) -> None:
    once = paired_bootstrap(values, draws=50)
    repeated = paired_bootstrap(
        [v for v in values for _ in range(times)], [i for i in range(len(values)) for _ in range(times)], draws=50
    )
    assert (repeated.mean, repeated.low, repeated.high) == pytest.approx((once.mean, once.low, once.high), abs=1e-9)
    assert (repeated.cases, repeated.prompts) == (times * len(values), len(values))
    assert min(values) - 1e-9 <= once.low <= once.high <= max(values) + 1e-9


def test_a_prompt_counts_once_however_many_cases_it_has() -> None:
    found = paired_bootstrap([1.0, 0.0, 0.0, 0.0], ["a", "b", "b", "b"])
    assert (found.mean, found.cases, found.prompts) == (0.5, 4, 2)


def test_an_interval_does_not_depend_on_how_much_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values, lengths = rng.normal(size=37), rng.integers(1, 900, 37)
    wanted = rng.random(37)
    before = paired_bootstrap(values), length_controlled_win_rate(wanted, lengths, lengths[::-1], draws=99)
    monkeypatch.setattr(statistics, "_CELLS", 111)
    assert paired_bootstrap(values) == before[0]
    again = length_controlled_win_rate(wanted, lengths, lengths[::-1], draws=99)
    assert (again.mean, again.low, again.high) == pytest.approx((before[1].mean, before[1].low, before[1].high))


def test_ties_are_half_a_win() -> None:
    assert preferences([2.0, 1.0, 1.0], [1.0, 1.0, 2.0]).tolist() == [1.0, 0.5, 0.0]
    assert win_rate([2.0, 1.0, 1.0, 5.0], [1.0, 1.0, 2.0, 5.0]).mean == 0.5
    everything = win_rate([3.0] * 9, [3.0] * 9)
    assert (everything.mean, everything.low, everything.high) == (0.5, 0.5, 0.5)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=20))
def test_sides_swapped_give_the_rest_of_the_rate(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    one, other = win_rate(a, b, draws=50), win_rate(b, a, draws=50)
    assert (one.mean, one.low, one.high) == pytest.approx((1 - other.mean, 1 - other.high, 1 - other.low))


def model_rate(wanted: np.ndarray, a: np.ndarray, b: np.ndarray, weights: np.ndarray, hard: np.ndarray | None) -> float:
    """The length-controlled rate by another optimiser, LBFGS on the loss as written down."""
    difference = torch.tensor(a - b, dtype=torch.float64)
    columns = [torch.ones_like(difference), torch.tanh(difference / difference.std())]
    if hard is not None:
        columns.append(torch.tensor(hard))
    x, y, w = torch.stack(columns, 1), torch.tensor(wanted), torch.tensor(weights)
    beta = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [beta], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(x @ beta, y, reduction="none")
        loss = (w * losses).sum() + RIDGE / 2 * beta.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    x[:, 1] = 0
    return ((torch.sigmoid(x @ beta) * w).sum() / w.sum()).item()


@pytest.mark.parametrize("with_difficulty", [False, True])
@pytest.mark.parametrize("decided", [False, True])
def test_length_control_is_the_model_it_says(with_difficulty: bool, decided: bool) -> None:
    rng = np.random.default_rng(5)
    for count in (8, 60):
        a, b = rng.integers(1, 2000, count).astype(float), rng.integers(1, 1500, count).astype(float)
        wanted = rng.random(count)
        wanted = wanted.round() if decided else wanted
        prompts = rng.integers(0, count // 2, count).tolist()
        share = np.array([1 / prompts.count(prompt) for prompt in prompts])
        hard = rng.normal(size=count) if with_difficulty else None
        found = length_controlled_win_rate(wanted, a, b, prompts, difficulty=hard, draws=2)
        assert found.mean == pytest.approx(model_rate(wanted, a, b, share, hard), abs=1e-6)


def judged(rng: np.random.Generator, theta: float, phi: float, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decisions of a judge of that model, and the lengths it saw."""
    b = rng.normal(1000, 150, count)
    a = b + rng.normal(300, 300, count)
    term = np.tanh((a - b) / (a - b).std(ddof=1))
    return (rng.random(count) < 1 / (1 + np.exp(-theta - phi * term))).astype(float), a, b


def test_a_judge_that_looks_at_length_alone_is_controlled_away() -> None:
    rng = np.random.default_rng(1)
    wanted, a, b = judged(rng, theta=0.0, phi=3.0, count=4000)
    assert paired_bootstrap(wanted, draws=50).low > 0.7
    found = length_controlled_win_rate(wanted, a, b, draws=200)
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.08


def test_a_judge_that_takes_the_longer_one_every_time() -> None:
    rng = np.random.default_rng(2)
    b = rng.normal(1000, 150, 400)
    a = b + rng.normal(200, 300, 400)
    found = length_controlled_win_rate((a > b).astype(float), a, b, draws=50)
    assert (a > b).mean() > 0.7
    assert found.mean == pytest.approx(0.5, abs=0.1)


def test_what_is_better_at_any_length_stays_so() -> None:
    rng = np.random.default_rng(4)
    truth = 1 / (1 + np.exp(-0.8))
    held = []
    for seed in range(40):
        wanted, a, b = judged(rng, theta=0.8, phi=1.5, count=300)
        found = length_controlled_win_rate(wanted, a, b, draws=200, seed=seed)
        held.append(found.low <= truth <= found.high)
    assert np.mean(held) > 0.8


def test_the_penalty_does_not_show() -> None:
    rng = np.random.default_rng(6)
    wanted, a, b = judged(rng, theta=0.4, phi=1.0, count=200)
    found = length_controlled_win_rate(wanted, a, b, draws=1).mean
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RIDGE", 1e-9)
        assert length_controlled_win_rate(wanted, a, b, draws=1).mean == pytest.approx(found, abs=1e-4)
    assert 0.99 < length_controlled_win_rate(np.ones(200), a, b, draws=20).mean < 1.0


def test_equal_lengths_leave_the_win_rate() -> None:
    wanted = [1.0, 0.0, 1.0, 0.5, 1.0]
    found = length_controlled_win_rate(wanted, [7] * 5, [7] * 5)
    assert found.mean == pytest.approx(0.7, abs=1e-3)  # the penalty on five comparisons


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_bootstrap([]), "at least one number"),
        (lambda: paired_bootstrap([1.0, float("nan")]), "finite"),
        (lambda: paired_bootstrap([1.0], ["a", "b"]), "1 cases, got 2"),
        (lambda: paired_bootstrap([1.0], draws=0), "draws"),
        (lambda: paired_bootstrap([1.0], level=1.0), "level"),
        (lambda: win_rate([1.0, 2.0], [1.0]), "2 and 1"),
        (lambda: length_controlled_win_rate([2.0, 0.0], [1, 2], [3, 9]), "0 .. 1"),
        (lambda: length_controlled_win_rate([1.0, 0.0], [3, 4], [1, 2]), "length differences is 2"),
        (lambda: length_controlled_win_rate([1.0, 0.0], [3, 4, 5], [1, 2, 9]), "same 2 cases"),
    ],
)
def test_what_has_no_answer_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
