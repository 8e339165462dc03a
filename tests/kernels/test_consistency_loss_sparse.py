"""The sparse plan: its bound entry by entry, its gradients against float64, and that it is the dense plan where it must be."""

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import consistency_loss
from engine.kernels.consistency_loss.native_rows import groups
from engine.kernels.consistency_loss.operation import LossImpl
from engine.kernels.consistency_loss.problem import Needs, Problem
from tests.kernels.consistency_cases import NAMES, Case, Results, assert_close, error, plain, random_case, rounding, run
from tests.kernels.references import randn

native_sparse = importlib.import_module("engine.kernels.consistency_loss.native_sparse")
EPS = 0.1


@pytest.fixture
def impl(instruction_set: str) -> LossImpl:
    return "cpp"


def trained_case(
    m: int = 24, drafts: int = 1, d: int = 64, v: int = 4000, *, sharpness: float = 12.0, common: float = 0.0,
    distance: float = 0.3, permuted: bool = False, **options: Any,
) -> Case:  # fmt: skip
    """Distributions as of a trained model: a few likely words, then a tail that falls off with the word's rank."""
    case = random_case(m, drafts, d, v, ignored=0, unpaired=0, distance=distance, **options)
    direction = torch.nn.functional.normalize(randn(11, d), dim=0)
    rarity = -torch.log(torch.arange(v) + 10.0)
    head = randn(12, v, d, scale=d**-0.5) + (0.5 * rarity + common)[:, None] * direction
    if permuted:
        head = head[torch.randperm(v, generator=torch.Generator().manual_seed(13))]
    target = sharpness * head[case.labels] + 3 * direction + 0.5 * randn(14, m, d)
    draft = target[case.pairs] + distance * randn(15, m * drafts, d, scale=d**-0.5 * float(target.norm(dim=1).mean()))
    return dataclasses.replace(case, target=target, draft=draft, weight=head).cast(case.weight.dtype)


def sparse(case: Case, impl: LossImpl, eps: float = EPS, **changes: Any) -> Results:
    return run(case, impl, plan="sparse", filter_eps=eps, **changes)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """(group, entries) of every group of rows; entries None where the dense plan took over."""
    seen: list[tuple[Any, Any]] = []
    entries_of = native_sparse._entries

    def spy(p: Any, needs: Any, group: Any, *rest: Any) -> Any:
        entries = entries_of(p, needs, group, *rest)
        seen.append((group, entries))
        return entries

    monkeypatch.setattr(native_sparse, "_entries", spy)
    return seen


def assert_within(actual: Results, case: Case, share: float = 1e-2) -> None:
    """The loss as exact as in float32, every gradient within ``share`` of its norm, before its own rounding."""
    exact = plain(case)
    rounded = 2 * error(plain(case, torch.float32).loss, exact.loss)
    assert error(actual.loss, exact.loss) <= rounded + 1e-5 * float(exact.loss)
    for name, a, e in zip(NAMES, actual.grads, exact.grads, strict=False):
        assert error(a, e) <= share * float(e.norm()) + rounding(e, a.dtype), (name, error(a, e) / float(e.norm()))


def gradient_of_logits(case: Case, group: Any, dtype: torch.dtype) -> Tensor:
    """[rows, v] of a group's targets and drafts at temperature 1, for labels and pairs without gaps, omega 1."""
    z_target, z_draft = (h.to(dtype) @ case.weight.to(dtype).T for h in (case.target, case.draft))
    one_hot = torch.nn.functional.one_hot(case.labels, len(case.weight))
    p = z_target.softmax(-1)
    g_target, g_draft = (p - one_hot) / len(case.target), (z_draft.softmax(-1) - p[case.pairs]) / len(case.draft)
    return torch.cat((g_target[group.targets], g_draft[group.drafts])).double()


@pytest.mark.parametrize("eps", [1e-3, 1e-2, 1e-1, 0.5])
@pytest.mark.parametrize("distance", [0.3, 0.01])
def test_what_is_left_out_is_bounded(eps: float, distance: float, impl: LossImpl, found: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(native_sparse, "MAX_DENSITY", 1.0)
    case = trained_case(drafts=2, distance=distance, omega=1.0)
    sparse(case, impl, eps)
    ((group, entries),) = found
    exact, low = (gradient_of_logits(case, group, dtype) for dtype in (torch.float64, torch.float32))
    kept = torch.zeros_like(exact)
    for row, (begin, count) in enumerate(zip(entries.begin.tolist(), entries.count.tolist(), strict=True)):
        columns = entries.columns[begin : begin + count].long()
        assert (columns.diff() > 0).all()
        kept[row, columns] = entries.values[begin : begin + count].double()
    mass = exact.abs().sum(1)
    there = kept != 0
    assert ((kept - exact) * there).norm() <= 2 * error(low, exact)
    left_out = exact.where(~there, 0)
    assert (left_out.abs().sum(1) <= eps * mass).all()
    targets = torch.arange(len(group.targets))
    assert there[targets, case.labels[group.targets]].all()
    assert error(entries.left_out, left_out.sum(0)) <= 2 * error(low.sum(0), exact.sum(0)) + 1e-3 * float(
        left_out.norm()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("drafts", [1, 2, 5])
def test_gradients_of_trained_rows(drafts: int, dtype: torch.dtype, impl: LossImpl, found: Any) -> None:
    case = trained_case(drafts=drafts, dtype=dtype)
    assert_within(sparse(case, impl), case)
    assert all(entries is not None for _, entries in found)


@pytest.mark.parametrize(
    "options",
    [
        {"common": 5.0},
        {"permuted": True},
        {"distance": 0.01},
        {"sharpness": 40.0},
        {"softcap": 30.0},
        {"bias": True, "omega": 2.0},
        {"temperature": 2.0, "omega": 2.0},
        {"omega": 0.0},
        {"d": 123, "v": 4099},
        {"d": 256, "m": 150},
    ],
    ids=lambda o: ",".join(o),
)
def test_gradients_of_adversarial_rows(options: dict[str, Any], impl: LossImpl) -> None:
    case = trained_case(**options)
    if options.get("omega") == 0:
        assert error(sparse(case, impl).grads[0], plain(case).grads[0]) <= 1e-2 * float(plain(case).grads[0].norm())
        return
    assert_within(sparse(case, impl), case)


def test_smaller_eps_is_more_accurate(impl: LossImpl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_sparse, "MAX_DENSITY", 1.0)
    case = trained_case(m=60)
    exact = plain(case)
    errors = [
        [error(a, e) for a, e in zip(sparse(case, impl, eps).grads, exact.grads, strict=True)] for eps in (0.2, 1e-3)
    ]
    assert all(fine < coarse / 10 for coarse, fine in zip(*errors, strict=True))


def test_untrained_rows_are_dense(impl: LossImpl, found: Any) -> None:
    case = random_case(40, 1, 64, 3000, omega=3.0)
    assert_close(sparse(case, impl), case)
    assert found[-1][1] is None


def test_one_hot_rows(impl: LossImpl) -> None:
    target = torch.zeros(3, 400)
    target[0, 3], target[1, 7], target[2, 39] = 200.0, 90.0, 30.0
    case = Case(
        target, target.roll(5, 1), torch.eye(400), torch.tensor([3, 7, 0]), torch.arange(3), None, {"omega": 0.5}
    )
    assert_within(sparse(case, impl), case)


def test_equal_streams(impl: LossImpl) -> None:
    results = sparse(trained_case(distance=0.0), impl)
    assert results.consistency == 0
    assert not results.grads[1].any()


def test_without_eps_it_is_the_dense_plan(impl: LossImpl) -> None:
    case = trained_case()
    dense, same = run(case, impl, plan="dense"), run(case, impl, plan="sparse")
    assert torch.equal(same.loss, dense.loss)
    assert all(map(torch.equal, same.grads, dense.grads))


def test_losses_and_statistics_are_exact(impl: LossImpl) -> None:
    case = trained_case(drafts=2)
    tensors = (*case.leaves(), case.labels, case.pairs)
    out = consistency_loss(*tensors, plan="sparse", filter_eps=EPS, impl=impl, return_stats=True)
    dense = consistency_loss(*tensors, impl=impl, return_stats=True)
    assert out.stats is not None
    assert dense.stats is not None
    for a, b in ((out.loss, dense.loss), (out.stats.lse, dense.stats.lse), (out.stats.entropy, dense.stats.entropy)):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    assert torch.equal(out.stats.argmax_agrees, dense.stats.argmax_agrees)


def test_other_choices_of_the_implementation() -> None:
    """PyTorch has no such plan and is exact; auto takes C++ on a CPU."""
    case = trained_case()
    assert_close(sparse(case, "torch"), case, bounded=False)
    if native_sparse.native() is not None:
        assert all(map(torch.equal, sparse(case, "auto").grads, sparse(case, "cpp").grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_groups(dtype: torch.dtype, impl: LossImpl, found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_sparse, "_group_rows", lambda p, needs: 17)
    case = trained_case(m=30, drafts=2, bias=True, omega=2.0, dtype=dtype)
    assert_within(sparse(case, impl), case)
    assert len(found) > 5


def test_a_trial_of_few_rows_comes_first(impl: LossImpl, found: Any) -> None:
    case = random_case(150, 1, 48, 500, ignored=0, unpaired=0)
    assert_close(sparse(case, impl), case)
    assert [len(group.hidden) for group, _ in found] == [native_sparse.TRIAL_ROWS]


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)], ids=str)
def test_subsets_of_gradients(wanted: tuple[int, ...], impl: LossImpl) -> None:
    case = trained_case(drafts=2)
    full = sparse(case, impl).grads
    leaves = [t.requires_grad_(bool(w)) for t, w in zip(case.leaves(), wanted, strict=True)]
    consistency_loss(*leaves, case.labels, case.pairs, plan="sparse", filter_eps=EPS, impl=impl).loss.backward()
    for leaf, gradient, w in zip(leaves, full, wanted, strict=True):
        assert (leaf.grad is not None) == bool(w)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_the_same_bits_every_time(impl: LossImpl) -> None:
    case = trained_case(m=40, drafts=2, softcap=30.0)
    first = sparse(case, impl)
    for _ in range(3):
        assert all(map(torch.equal, sparse(case, impl).grads, first.grads))


@pytest.mark.parametrize(("m", "ignored"), [(0, 0.0), (1, 0.0), (20, 1.0)])
def test_masked_and_empty(m: int, ignored: float, impl: LossImpl) -> None:
    case = random_case(m, 1, 8, 50, ignored=ignored, unpaired=ignored)
    assert_close(sparse(case, impl), case, twice=m > 1)  # of one row plain float32's own error may be luck


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("density", [1 / 8, 1.0], ids=["dense", "sparse"])
def test_broken_rows_show(broken: float, density: float, impl: LossImpl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_sparse, "MAX_DENSITY", density)
    case = trained_case(m=20)
    draft = case.draft.clone()
    draft[4, 3] = broken
    results = sparse(dataclasses.replace(case, draft=draft), impl)
    assert not results.loss.isfinite()
    assert results.ar.isfinite()
    assert results.grads[1][4].isnan().all()
    assert results.grads[1][[3, 5]].isfinite().all()
    assert results.grads[0].isfinite().all()
    assert results.grads[2].isnan().any()


@given(
    pairs=st.lists(st.integers(-1, 39), max_size=160),
    first=st.integers(1, 60),
    limit=st.integers(1, 90),
    spread=st.booleans(),
)
def test_groups_cover_every_row_once(pairs: list[int], first: int, limit: int, spread: bool) -> None:
    pair, wide = torch.tensor(pairs, dtype=torch.int64), torch.zeros(0)
    p = Problem(
        wide, wide, wide, None, torch.zeros(40, dtype=torch.int64), pair, torch.ones(40), wide, None, 1.0, EPS, "sparse"
    )
    parts = groups(p, Needs(True, True, True, False, False), first, limit, spread)
    assert sorted(torch.cat([targets for targets, _, _ in parts]).tolist()) == list(range(40))
    assert sorted(torch.cat([drafts for _, drafts, _ in parts]).tolist()) == (pair >= 0).nonzero().flatten().tolist()
    for number, (targets, drafts, teachers) in enumerate(parts):
        assert torch.equal(targets[teachers], pair[drafts])
        assert len(targets) + len(drafts) <= (limit if number else first) or len(targets) == 1
    if spread and not (pair >= 0).any():
        gaps = parts[0][0].diff()
        assert len(parts[0][0]) == min(first, 40)
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_rows_of_one_answer_do_not_decide_for_all(impl: LossImpl, found: Any) -> None:
    """The first rows are flat distributions, of which little can be left out; the others are a trained model's."""
    case = trained_case(m=300)
    case.target[:16] *= 0.01
    case.draft[:16] *= 0.01
    sparse(case, impl)
    trial = found[0][0].targets
    assert (trial >= 16).sum() > len(trial) / 2
    assert len(found) > 1
