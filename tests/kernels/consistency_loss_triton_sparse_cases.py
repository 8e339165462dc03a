"""The Triton plan "sparse": what it leaves out, against float64; run as consistency_loss_triton_cases.py is."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.kernels.consistency_loss import triton_gather, triton_sparse
from engine.kernels.consistency_loss.problem import Needs, Problem
from tests.kernels.consistency_loss_triton_cases import DEVICE, EVERYTHING, FIELDS, check, make, plainly
from tests.kernels.references import FEW, randn

EPS = 0.05
GRADIENTS = FIELDS[2:]
NEEDS = Needs(True, True, True, False, False)


def language(
    m: int, drafts: int, v: int, d: int, *, dtype: torch.dtype = torch.float32, common: float = 0.5, distance: float = 0.1,
    permuted: bool = False, **options: float,
) -> Problem:  # fmt: skip
    """Like a trained model's: frequent words first, through a direction that all of W shares, and a few likely words a row.

    ``common``: the share of that direction in W; every third row has no cross entropy.
    """
    generator = torch.Generator().manual_seed(0)
    frequency = -(torch.arange(v) + 2.7).log()
    words = torch.multinomial(frequency.exp(), 7 * m, replacement=True, generator=generator).view(m, 7)
    along, w = torch.nn.functional.normalize(randn(1, d), dim=0), randn(2, v, d) / d**0.5
    w -= (w @ along)[:, None] * along
    h = (w[words] * torch.tensor([9.0, 6, 6, 6, 6, 6, 6])[:, None]).sum(1) + 6 * along
    w += (common + (frequency - frequency.mean()) / 6)[:, None] * along
    pair = torch.arange(m).repeat(drafts)
    t = h[pair] + distance * h[pair].norm(dim=1, keepdim=True) * randn(3, m * drafts, d) / d**0.5
    if permuted:
        order = torch.randperm(v, generator=generator)
        w, words = w[order], order.argsort()[words]
    p = make(m, pair.tolist(), d, v, dtype=dtype, plan="sparse", **options)  # type: ignore[arg-type]
    new = {"target_hidden": h, "draft_hidden": t, "weight": w}
    new = {name: tensor.to(DEVICE, dtype) for name, tensor in new.items()}
    return replace(p, **new, labels=words[:, 0].to(DEVICE), filter_eps=EPS)  # type: ignore[arg-type]


def errors(p: Problem, needs: Needs = NEEDS) -> tuple[dict[str, float], triton_sparse.Density]:
    """Relative errors of the gradients, and what was multiplied; losses are exact."""
    out, density = triton_sparse.with_density(p, needs)
    exact, plain = plainly(p, torch.float64), plainly(p, torch.float32)
    for name in FIELDS[:2]:
        size = exact[name].norm() + exact[name].abs().max() * p.labels.numel() ** 0.5
        allowed = 2 * (plain[name].double() - exact[name]).norm() + FEW * torch.finfo(torch.float32).eps * size
        assert (getattr(out, name).double() - exact[name]).norm() <= allowed, name
    found = {name: getattr(out, name) for name in GRADIENTS}
    return {
        name: float((x.double() - exact[name]).norm() / exact[name].norm())
        for name, x in found.items()
        if x is not None
    }, density


def rows_of_g(dtype: torch.dtype) -> Tensor:
    """[9, 1500]: heavy and light tails, flat, one entry, nothing, near the ends of the range, one outlier."""
    x = torch.stack(
        [(width * randn(i, 1500)).exp() * randn(i + 9, 1500).sign() for i, width in enumerate((0.1, 1, 3, 6))]
    )
    flat, single, nothing = torch.ones(1500), torch.zeros(1500), torch.zeros(1500)
    single[77] = -0.3
    outlier = 1e-3 * randn(20, 1500).abs() + 1000 * single
    return torch.stack([*x, flat, single, nothing, 1e-30 * flat, outlier]).to(DEVICE, dtype)


@pytest.mark.parametrize("eps", [1e-4, 0.03, 0.4, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropped_mass_is_bounded_and_no_threshold_is_needlessly_low(dtype: torch.dtype, eps: float) -> None:
    g = rows_of_g(dtype)
    threshold = triton_sparse.thresholds(g, eps)
    size, mass = g.double().abs(), g.double().abs().sum(1)
    assert (size.where(size < threshold[:, None], 0).sum(1) <= eps * mass).all()
    # a bucket's entries are counted as at most 1.5 times what they are
    next_edge = (threshold.view(torch.int32) + (1 << 22)).view(torch.float32).clamp_min(1.2e-38)
    more = size.where(size < next_edge[:, None], 0).sum(1)
    assert (1.5 * more >= triton_sparse.MARGIN * eps * mass).all()


def test_blocks_hold_what_exceeds_the_threshold_and_sums_of_the_rest() -> None:
    g = on_memory(randn(1, 13, 50) ** 5)
    threshold, labels = g.abs().amax(1) * 0.3, torch.arange(6, device=DEVICE) * 8
    panels = torch.empty(2, 50, 8, device=DEVICE)
    of_rows, of_columns = triton_sparse.divided(g, threshold, labels, panels, True, 8)
    counts = g.abs() >= threshold[:, None]
    counts[torch.arange(6), labels] = True
    assert of_rows is not None
    assert of_columns is not None
    for side, x, kept in ((of_rows, g, counts), (of_columns, g.T, counts.T)):
        for i in range(side.flags.shape[0]):
            block = slice(8 * i, 8 * i + 8)
            flags = kept[block].any(0)
            assert torch.equal(side.flags[i].bool(), flags)
            left = x[block].where(~flags, 0).double()
            torch.testing.assert_close(side.mass[i].double(), left.abs().sum(0), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(side.left.sum(0)[block].double(), left.sum(1), rtol=1e-6, atol=1e-6)
    padded = torch.cat([g, torch.zeros(3, 50, device=DEVICE)])
    assert torch.equal(panels, padded.view(2, 8, 50).transpose(1, 2))


def on_memory(g: Tensor) -> Tensor:
    """In rows of 64 columns, as the plan's buffers are."""
    memory = torch.full((g.shape[0], 64), float("nan"), device=DEVICE)
    memory[:, : g.shape[1]] = g
    return memory[:, : g.shape[1]]


@pytest.mark.parametrize("length", [1, 7, 5000])
def test_lists_name_what_is_flagged(length: int) -> None:
    share = torch.tensor([0.0, 0.1, 0.5, 0.7, 0.8, 1.0])
    flags = (randn(1, 6, length).abs().argsort(1).argsort(1) < (share * length)[:, None]).to(DEVICE, torch.int8)
    lists = triton_gather.listed(flags, 0.75)
    for flag, index, count in zip(flags, lists.index, lists.count.tolist(), strict=True):
        expected = (
            flag.nonzero().flatten() if int(flag.sum()) <= int(0.75 * length) else torch.arange(length, device=DEVICE)
        )
        assert index[:count].tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_product_over_lists(dtype: torch.dtype) -> None:
    """Three tiles, the last one not full, with lists of nothing, a few and everything."""
    t, length, d = triton_gather.tiles(dtype), 90, 300
    a, b = randn(1, 3, length, t.rows).to(DEVICE, dtype), randn(2, length, d).to(DEVICE, dtype)
    flags = torch.zeros(3, length, dtype=torch.int8, device=DEVICE)
    flags[1, 3::2], flags[2] = 1, 1
    rows = 3 * t.rows - 5
    tail, mean = randn(3, rows).to(DEVICE), randn(4, 3, d).to(DEVICE)
    out = torch.full((rows, d), float("nan"), device=DEVICE)
    expected = (a.double() * flags[:, :, None]).transpose(1, 2) @ b.double()
    expected[:2] += torch.nn.functional.pad(tail, (0, 5)).view(3, -1, 1)[:2] * mean[:2, None].double()
    expected = expected.flatten(0, 1)[:rows]
    for times in (1, 2):
        triton_gather.add_gathered(out, a, b, triton_gather.listed(flags, 0.75), t, tail, mean, times == 1)
        torch.testing.assert_close(out.double(), times * expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("drafts", [1, 2, 5])
def test_gradients_of_a_trained_model(drafts: int) -> None:
    found, density = errors(language(12, drafts, 2000, 48))
    print(found, float(density.hidden), float(density.weight))
    assert all(error <= 1e-2 for error in found.values()), found
    assert 0 < density.hidden < 0.9
    assert 0 < density.weight < 0.9
    assert density.units() == pytest.approx(2 + 2 * float(density.hidden) + 2 * float(density.weight))


@pytest.mark.parametrize(
    "options",
    [{"common": 4.0}, {"permuted": True}, {"distance": 1e-3}, {"softcap": 20.0}, {"temperature": 2.0}, {"bias": True}],
    ids=str,
)
def test_gradients_of_others(options: dict[str, float]) -> None:
    found, density = errors(language(32, 1, 2000, 48, **options), replace(NEEDS, bias="bias" in options))  # type: ignore[arg-type]
    print(found, float(density.hidden), float(density.weight))
    assert all(error <= 1e-2 for error in found.values()), found


def test_a_direction_common_to_all_of_w_needs_the_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    p = replace(language(32, 1, 2000, 48, common=4.0), filter_eps=0.2)
    with_tail, _ = errors(p)
    mean = triton_sparse.Side.mean
    monkeypatch.setattr(triton_sparse.Side, "mean", lambda side, source: 0 * mean(side, source))
    without, _ = errors(p)
    print(with_tail, without)
    assert without["grad_target"] > 3 * with_tail["grad_target"]
    assert without["grad_draft"] > 3 * with_tail["grad_draft"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exact_where_nothing_is_small(dtype: torch.dtype) -> None:
    """A model that knows nothing: every column exceeds some row's threshold, and every row some column's."""
    p = replace(make(70, [i // 2 for i in range(140)], 48, 700, dtype=dtype, plan="sparse"), filter_eps=EPS)
    out, density = triton_sparse.with_density(p, NEEDS)
    check(p, NEEDS, out)
    assert density.hidden == density.weight == 1


def test_exact_above_break_even(monkeypatch: pytest.MonkeyPatch) -> None:
    p = language(24, 1, 1000, 48)
    monkeypatch.setattr(triton_sparse, "DENSE_ABOVE", 0.0)
    out, density = triton_sparse.with_density(p, NEEDS)
    check(p, NEEDS, out)
    # but blocks where nothing counts at all
    assert density.hidden == 1


def test_no_share_to_leave_out_is_the_dense_plan() -> None:
    p = replace(language(8, 1, 300, 16), filter_eps=0.0)
    sparse, dense = (triton_sparse.loss_and_gradients(p, NEEDS), triton_sparse.dense(p, NEEDS))
    for name in FIELDS[:5]:
        assert torch.equal(getattr(sparse, name), getattr(dense, name)), name


def test_one_hot_rows() -> None:
    """A gradient that is the label's entry and that of one other word; of rows that are certain and right, nothing."""
    p = language(16, 1, 1000, 48)
    found, _ = errors(replace(p, weight=p.weight * 30))
    assert all(error <= 1e-2 for error in found.values()), found


def test_repeats_to_the_bit() -> None:
    p = language(24, 1, 1000, 48, dtype=torch.bfloat16)
    one, two = (triton_sparse.loss_and_gradients(p, replace(EVERYTHING, bias=False)) for _ in range(2))
    for name in FIELDS[:5]:
        assert torch.equal(getattr(one, name), getattr(two, name)), name


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(broken: float) -> None:
    p = language(12, 1, 500, 16)
    p.draft_hidden[1, 2] = p.target_hidden[0, 3] = broken
    out = triton_sparse.loss_and_gradients(p, NEEDS)
    assert out.grad_draft is not None
    assert out.grad_target is not None
    assert out.grad_weight is not None
    assert not out.grad_draft[1].isfinite().any()
    assert not out.grad_target[0].isfinite().any()
    assert not out.grad_weight.isfinite().any()
    assert out.grad_target[2:].isfinite().all()


def test_hidden_rows_without_a_head() -> None:
    p = language(24, 1, 1000, 48)
    for needs in (
        replace(NEEDS, weight=False),
        replace(NEEDS, target=False, draft=False),
        replace(NEEDS, target=False),
    ):
        out, together = triton_sparse.with_density(p, needs)[0], triton_sparse.with_density(p, NEEDS)[0]
        for name, wanted in zip(GRADIENTS, (needs.target, needs.draft, needs.weight, needs.bias), strict=True):
            assert (getattr(out, name) is not None) == wanted
            if wanted:
                torch.testing.assert_close(getattr(out, name), getattr(together, name))
