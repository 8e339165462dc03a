"""Means, win rates and length-controlled win rates with bootstrap intervals over prompts.

Several cases of one prompt (drafts of several base models, say) are no independent trials. Everywhere here a prompt counts
once, its cases share that weight, and the bootstrap draws whole prompts.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 2000
LEVEL = 0.95
FEWEST = 6
"""Prompts below which no interval should be shown: that all of five fall on one side by chance is likelier than one in twenty,
and the bootstrap, which draws from these five, cannot know of the other side."""
RIDGE = 0.001
"""Penalty on the squared coefficients of the length-controlled win rate, whose data weigh 1 a prompt: it keeps them finite
where every comparison is won, and moves the rate of five prompts that are all won by 0.001 to 0.002, that of thirty by 0.0003.
It moves it further where length alone would tell the few that are lost."""
_NEWTON_STEPS = 100
_CELLS = 1 << 22  # numbers held at once while resampling
Floats = NDArray[np.float64]
Prompts = Sequence[Hashable] | None
"""Which prompt every case belongs to; None: each is a prompt of its own."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, the bounds of its percentile interval, and what it was computed from."""

    mean: float
    low: float
    high: float
    cases: int
    prompts: int


def paired_bootstrap(
    values: ArrayLike, prompts: Prompts = None, *, draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> Estimate:
    """Mean over prompts of ``values`` [cases], with its percentile interval (Efron & Tibshirani 1993, chapter 13).

    To compare two sides give the differences, case by case: that is what makes it paired. With one prompt the interval is a
    point, and means nothing. Raises ValueError without values, or where one is not finite.
    """
    sample, groups = _checked("values", values), _groups(prompts, values)
    means = np.bincount(groups, sample) / np.bincount(groups)
    drawn = [means[chosen].mean(1) for chosen in _resamples(len(means), draws, seed)]
    return _estimate(float(means.mean()), np.concatenate(drawn), groups, level)


def preferences(candidate: ArrayLike, baseline: ArrayLike) -> Floats:
    """1 where ``candidate`` [cases] is larger, 0 where ``baseline`` is, 0.5 where they are equal."""
    a, b = _checked("candidate", candidate), _checked("baseline", baseline)
    if a.shape != b.shape:
        raise ValueError(f"candidate and baseline must be of the same cases, got {a.size} and {b.size}")
    return (np.sign(a - b) + 1) / 2


def win_rate(
    candidate: ArrayLike,
    baseline: ArrayLike,
    prompts: Prompts = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = LEVEL,
) -> Estimate:
    """Share of comparisons, 0 to 1, that ``candidate`` [cases] wins by a larger value; a tie is half a win."""
    return paired_bootstrap(preferences(candidate, baseline), prompts, draws=draws, seed=seed, level=level)


def length_controlled_win_rate(
    preferred: ArrayLike,
    candidate_lengths: ArrayLike,
    baseline_lengths: ArrayLike,
    prompts: Prompts = None,
    *,
    difficulty: ArrayLike | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = LEVEL,
) -> Estimate:
    """The win rate a logistic model predicts for answers of equal length, after AlpacaEval 2 (Dubois et al. 2404.04475).

    ``preferred`` [cases] holds preferences for the candidate in 0 .. 1, lengths are in characters, ``difficulty`` is one number
    per case, the same for a prompt whoever answers.

    Kept: P(candidate preferred) = sigmoid(theta + phi * tanh(length difference / its standard deviation) + psi * difficulty),
    fitted to probabilities as well as to decisions by cross entropy; the difference is scaled, not centred; the rate is the
    mean prediction with the length term at zero. Not kept: difficulties fitted on a leaderboard (give your own, or none: then
    that term is absent), the pull towards two "gamed" baselines, an L1 penalty chosen by cross-validation (here RIDGE on every
    coefficient), and their standard error over predictions, which leaves out that the coefficients are estimates: here the
    model is fitted again to every bootstrap sample, in the units of the whole one.

    If the candidate is nearly always longer, zero is outside the data and the rate an extrapolation: state the length
    difference beside it. Raises ValueError where all lengths differ by the same amount, which no model can tell from
    preference.
    """
    wanted = _checked("preferred", preferred)
    if wanted.min() < 0 or wanted.max() > 1:
        raise ValueError(f"preferred must lie in 0 .. 1, got {wanted.min()} .. {wanted.max()}")
    columns = [np.ones(wanted.size), _length_term(candidate_lengths, baseline_lengths)]
    if difficulty is not None:
        columns.append(_checked("difficulty", difficulty))
    sizes = [len(column) for column in columns]
    if set(sizes) != {wanted.size}:
        raise ValueError(f"lengths and difficulty must be of the same {wanted.size} cases, got {sizes[1:]}")
    features = np.stack(columns, 1)
    groups = _groups(prompts, wanted)
    share = 1 / np.bincount(groups)[groups]
    count = int(groups.max()) + 1
    whole = _rates(features, wanted, share[None])
    drawn = [whole[:0]]
    for chosen in _resamples(count, draws, seed, wanted.size * features.shape[1]):
        times = np.stack([np.bincount(one, minlength=count) for one in chosen])
        drawn.append(_rates(features, wanted, times[:, groups] * share))
    return _estimate(float(whole[0]), np.concatenate(drawn), groups, level)


def _length_term(candidate: ArrayLike, baseline: ArrayLike) -> Floats:
    a, b = _checked("candidate_lengths", candidate), _checked("baseline_lengths", baseline)
    if a.shape != b.shape:
        raise ValueError(f"lengths must be of the same cases, got {a.size} and {b.size}")
    difference = a - b
    if not difference.any():
        return difference
    if a.size < 2 or np.ptp(difference) == 0:
        raise ValueError(
            f"every one of {a.size} length differences is {difference[0]:g}: a preference for length cannot be told from one "
            "for the candidate; report the win rate and the lengths"
        )
    return np.tanh(difference / difference.std(ddof=1))


def _rates(features: Floats, preferred: Floats, weights: Floats) -> Floats:
    """[samples] of predicted win rates without the length term, of models fitted with ``weights`` [samples, cases]."""
    coefficients = _fit(features, preferred, weights)
    without_length = features.copy()
    without_length[:, 1] = 0
    predicted = _sigmoid(coefficients @ without_length.T)
    rates: Floats = (predicted * weights).sum(1) / weights.sum(1)
    return rates


def _fit(features: Floats, preferred: Floats, weights: Floats) -> Floats:
    """Coefficients [samples, features] of ridge logistic regressions, by Newton's method with step halving."""
    size = features.shape[1]
    coefficients = np.zeros((len(weights), size))
    loss = _loss(features, preferred, weights, coefficients)
    for _ in range(_NEWTON_STEPS):
        predicted = _sigmoid(coefficients @ features.T)
        gradient = (weights * (predicted - preferred)) @ features + RIDGE * coefficients
        curvature = weights * predicted * (1 - predicted)
        hessian = np.einsum("sc,cf,cg->sfg", curvature, features, features, optimize=True) + RIDGE * np.eye(size)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        if np.abs(step).max() < 1e-10:
            break
        scale = np.ones((len(weights), 1))
        for _ in range(30):
            tried = coefficients - scale * step
            new = _loss(features, preferred, weights, tried)
            worse = new > loss + 1e-12 * np.abs(loss)
            if not worse.any():
                break
            scale[worse] /= 2
        coefficients = np.where(worse[:, None], coefficients, tried)
        loss = np.where(worse, loss, new)
    return coefficients


def _loss(features: Floats, preferred: Floats, weights: Floats, coefficients: Floats) -> Floats:
    logits = coefficients @ features.T
    terms = np.logaddexp(0, logits) - preferred * logits
    loss: Floats = (weights * terms).sum(1) + 0.5 * RIDGE * (coefficients**2).sum(1)
    return loss


def _sigmoid(logits: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -logits))


def _checked(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} must be a list of at least one number, got the shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite: leave cases without a value out, and count them")
    return array


def _groups(prompts: Prompts, values: ArrayLike) -> NDArray[np.int64]:
    """The number of every case's prompt, by first appearance."""
    cases = np.asarray(values).size
    if prompts is None:
        return np.arange(cases)
    if len(prompts) != cases:
        raise ValueError(f"prompts must name one prompt for each of {cases} cases, got {len(prompts)}")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts])


def _resamples(count: int, draws: int, seed: int, cells: int = 0) -> Iterator[NDArray[np.int64]]:
    """Numbers of prompts drawn with replacement, [some draws, count]; the same whatever is drawn at once."""
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    rng = np.random.default_rng(seed)
    at_once = max(1, _CELLS // max(count, cells))
    for start in range(0, draws, at_once):
        yield rng.integers(count, size=(min(at_once, draws - start), count))


def _estimate(mean: float, drawn: Floats, groups: NDArray[np.int64], level: float) -> Estimate:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    low, high = np.quantile(drawn, ((1 - level) / 2, (1 + level) / 2))
    return Estimate(mean, float(low), float(high), len(groups), int(groups.max()) + 1)
