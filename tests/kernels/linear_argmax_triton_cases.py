"""The Triton projections with argmax and with sampling, on a GPU or, with TRITON_INTERPRET=1, on a CPU.

Not collected by default: Triton reads that variable when it is imported, so these run in a process of their own
(test_triton_interpreter.py starts it).
"""

import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import LinearWeight, linear_argmax, linear_sample
from engine.kernels.gpu import logits_tile
from engine.kernels.gumbel_noise import gumbel_noise
from tests.kernels import references
from tests.kernels.references import EPSILON, lowest_argmax, randn, tolerance

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DEVICE = "cpu" if INTERPRETED else "cuda"
INFINITY, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [1, 16, 17, 33, 65, 129]
"""One of each tile."""

if INTERPRETED:
    from tests.kernels.triton_interpreter import repair

    repair()


@dataclass(frozen=True)
class Case:
    hidden: Tensor
    matrix: Tensor
    bias: Tensor | None
    softcap: float | None

    def logits(self, dtype: torch.dtype) -> Tensor:
        bias = None if self.bias is None else self.bias.to(dtype)
        z = references.linear(self.hidden.to(dtype), self.matrix.to(dtype), bias)
        return references.soft_capped(z, self.softcap)

    def allowed(self) -> Tensor:
        """Of every logit; the cap has a slope of at most 1."""
        bias = 0.0 if self.bias is None else self.bias.float().abs()
        magnitude = self.hidden.float().abs() @ self.matrix.float().abs().T + bias
        return tolerance(self.logits(torch.float64), self.logits(torch.float32), magnitude)

    def argmax(self, row_count: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return linear_argmax(
            self.hidden.to(DEVICE), plain(self.matrix), on(self.bias), softcap=self.softcap, row_count=on(row_count),
            impl="triton",
        )  # fmt: skip

    def sample(
        self, temperature: Tensor, seeds: Tensor, positions: Tensor, row_count: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        index, log_p = linear_sample(
            self.hidden.to(DEVICE), plain(self.matrix), on(self.bias), temperature=temperature.to(DEVICE),
            seeds=seeds.to(DEVICE), positions=positions.to(DEVICE), softcap=self.softcap, row_count=on(row_count),
            log_probability=True, impl="triton",
        )  # fmt: skip
        assert log_p is not None
        return index.cpu(), log_p.cpu()


def on(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(DEVICE)


def plain(matrix: Tensor) -> LinearWeight:
    """As it lies on GPUs."""
    return LinearWeight(matrix.to(DEVICE), *matrix.shape, packed=False)


def make(
    rows: int, d: int, v: int, dtype: torch.dtype, softcap: float | None = None, with_bias: bool = False
) -> Case:  # fmt: skip
    hidden, matrix = randn(0, rows, d, dtype=dtype), randn(1, v, d, dtype=dtype, scale=3 / d**0.5)
    return Case(hidden, matrix, randn(2, v, dtype=dtype) if with_bias else None, softcap)


def check(case: Case) -> None:
    """The index is that of the float64 logits, or of one that float32 cannot tell from it."""
    exact, allowed = case.logits(torch.float64), case.allowed()
    index, value = case.argmax()
    assert (index.dtype, value.dtype) == (torch.int64, torch.float32)
    assert index.shape == value.shape == case.hidden.shape[:1]
    for row, (i, found) in enumerate(zip(index.tolist(), value.tolist(), strict=True)):
        best = lowest_argmax(exact[row].tolist())
        assert abs(found - exact[row, i]) <= allowed[row, i]
        assert exact[row, best] - exact[row, i] <= allowed[row, i] + allowed[row, best]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_every_tile(rows: int, dtype: torch.dtype) -> None:
    """Aligned and with a depth that is no multiple; a vocabulary that ends within a tile."""
    check(make(rows, 144, 300, dtype, softcap=30.0))
    if rows < 65:
        check(make(rows, 33, 100, dtype, with_bias=True))


@pytest.mark.parametrize(("v", "d"), [(1, 3), (2, 1), (63, 16), (64, 128), (65, 160), (257, 48)])
def test_small_and_exact_shapes(v: int, d: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(make(5, d, v, dtype, softcap=2.0, with_bias=True))


@pytest.mark.parametrize(
    ("rows", "copies"),
    [(3, (0, 1)), (3, (63, 64)), (3, (5, 64, 598, 599)), (129, (31, 32)), (129, (255, 256)), (129, (3, 250, 300, 599))],
)
def test_the_lowest_of_equal_rows_wins(rows: int, copies: tuple[int, ...]) -> None:
    """Within a part of a tile, across parts and across tiles; of whole numbers, whose sums are equal in any order."""
    hidden, matrix = randn(0, rows, 16, dtype=torch.bfloat16).round(), randn(1, 600, 16, dtype=torch.bfloat16).round()
    bias = torch.zeros(600, dtype=torch.bfloat16)
    for i in copies:
        matrix[i], bias[i] = matrix[copies[0]], 256.0
    case = Case(hidden, matrix, bias, 30.0 if rows == 3 else None)
    assert case.argmax()[0].tolist() == [copies[0]] * rows


@pytest.mark.parametrize("rows", [3, 129])
def test_the_lowest_of_equal_capped_values_wins(rows: int) -> None:
    """Logits far above the cap all become the cap, whatever their order before it."""
    matrix = torch.zeros(600, 16)
    for size, i in enumerate([300, 7, 500, 280, 599, 9]):
        matrix[i, 0] = 100.0 + size
    hidden = torch.zeros(rows, 16)
    hidden[:, 0] = torch.tensor([1.0, 50.0, -1.0]).repeat(rows)[:rows]
    index, value = Case(hidden, matrix, None, 1.0).argmax()
    expected = torch.tensor([7, 7, 0]).repeat(rows)[:rows]
    assert index.tolist() == expected.tolist()
    assert value.tolist() == [1.0 if i else 0.0 for i in expected]
    index, _ = Case(hidden, matrix, None, None).argmax()
    assert index.tolist() == torch.tensor([9, 9, 0]).repeat(rows)[:rows].tolist()


@settings(max_examples=8, deadline=None)
@given(
    st.floats(-9.0, 9.0),
    st.lists(st.tuples(st.integers(0, 99), st.integers(-40, 40)), min_size=2, max_size=6, unique_by=lambda x: x[0]),
    st.sampled_from([0.5, 30.0]),
)
def test_ties_after_the_cap_are_those_of_all_capped_values(
    x: float, near: list[tuple[int, int]], cap: float
) -> None:  # fmt: skip
    """Logits a few units in the last place apart: the answer is as if the cap had been applied to each of them.

    Every value is found out on its own first, in a vocabulary of one.
    """
    centre = torch.tensor(x * cap)
    matrix = torch.full((100, 16), 0.0)
    matrix[:, 0] = centre - 10 * cap
    for column, steps in near:
        matrix[column, 0] = centre + centre.abs() * steps * EPSILON
    hidden = torch.zeros(1, 16)
    hidden[0, 0] = 1.0
    alone = Case(hidden, matrix[:, :1] * torch.eye(1, 16), None, cap)
    values = [Case(hidden, alone.matrix[i : i + 1], None, cap).argmax()[1].item() for i, _ in near]
    index, value = alone.argmax()
    assert value.item() == max(values)
    assert index.item() == min(i for (i, _), v in zip(near, values, strict=True) if v == max(values))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rows", [5, 70])
def test_nan_and_infinite_logits(softcap: float | None, rows: int) -> None:
    matrix = torch.zeros(70, 2)
    matrix[:, 0] = 1.0
    hidden = torch.tensor([[NAN, 0.0], [1.0, 0.0], [-INFINITY, 0.0], [INFINITY, 0.0], [0.0, NAN]]).repeat(rows // 5, 1)
    case = Case(hidden, matrix, None, softcap)
    index, value = case.argmax()
    assert index.tolist() == [-1, 0, 0, 0, -1] * (rows // 5)
    assert value.isnan().tolist() == [True, False, False, False, True] * (rows // 5)
    infinity = softcap or INFINITY
    assert value[2:4].tolist() == [-infinity, infinity]
    vectors = torch.zeros(rows), torch.arange(rows), torch.arange(rows)
    assert torch.equal(case.sample(*vectors)[0], index.cpu())
    tokens, log_p = case.sample(torch.ones(rows), *vectors[1:])
    assert (tokens >= 0).tolist() == [False, True, True, True, False] * (rows // 5)
    assert log_p[0].isnan()
    assert log_p[1].item() == pytest.approx(-torch.tensor(70.0).log().item(), rel=1e-6)


@pytest.mark.parametrize("rows", [2, 70])
def test_nan_in_some_logits_is_passed_over(rows: int) -> None:
    """NaN before, beside and after the largest value; whole tiles of it; -inf next to it."""
    for best, broken in ((0, [1, 599]), (33, [0, 32, 34]), (500, list(range(500))), (5, list(range(6, 600)))):
        bias = torch.zeros(600)
        bias[best], bias[broken] = 7.0, NAN
        case = Case(torch.zeros(rows, 8), torch.zeros(600, 8), bias, None)
        for softcap in (None, 3.0):
            index, value = Case(case.hidden, case.matrix, bias, softcap).argmax()
            assert index.tolist() == [best] * rows
            assert not value.isnan().any()
        tokens, log_p = case.sample(torch.full((rows,), 1e-3), torch.arange(rows), torch.arange(rows))
        assert tokens.tolist() == [best] * rows
        assert log_p.isfinite().all()
    bias = torch.full((600,), NAN)
    bias[444] = bias[555] = -INFINITY
    case = Case(torch.zeros(rows, 8), torch.zeros(600, 8), bias, None)
    index, value = case.argmax()
    assert index.tolist() == [444] * rows
    assert value.tolist() == [-INFINITY] * rows
    assert case.sample(torch.ones(rows), torch.arange(rows), torch.arange(rows))[0].tolist() == [444] * rows


@pytest.mark.parametrize("behind", [NAN, 1.0])
def test_rows_behind_the_count_are_left_out(behind: float) -> None:
    """Whatever they hold, and bits of the others as without them; a count beyond the rows is all of them."""
    for rows, counts in ((20, (0, 1, 16, 30)), (140, (128, 130))):
        case = make(rows, 32, 200, torch.bfloat16, softcap=5.0)
        vectors = torch.full((rows,), 0.7), torch.arange(rows), torch.arange(rows)
        whole, drawn = case.argmax(), case.sample(*vectors)
        for count in counts:
            case.hidden[count:] = behind
            row_count = torch.tensor([count], dtype=torch.int32)
            index, value = case.argmax(row_count)
            assert torch.equal(index[:count], whole[0][:count])
            assert torch.equal(value[:count], whole[1][:count])
            assert index[count:].tolist() == [-1] * max(0, rows - count)
            assert value[count:].isnan().all()
            tokens, log_p = case.sample(*vectors, row_count)
            assert torch.equal(tokens[:count], drawn[0][:count])
            assert torch.equal(log_p[:count], drawn[1][:count])
            assert tokens[count:].tolist() == [-1] * max(0, rows - count)
            assert log_p[count:].isnan().all()
            case = make(rows, 32, 200, torch.bfloat16, softcap=5.0)


def test_no_rows() -> None:
    case = make(0, 32, 200, torch.float32)
    assert [x.shape[0] for x in case.argmax()] == [0, 0]
    empty = torch.zeros(0)
    assert [x.shape[0] for x in case.sample(empty, empty.long(), empty.long())] == [0, 0]


def check_samples(case: Case, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """The token has the best score in float64, or one that rounding cannot tell from it."""
    z, allowed, g = case.logits(torch.float64), case.allowed(), gumbel_noise(seeds, positions, case.matrix.shape[0])
    t = temperature.double()[:, None]
    scores = z + t * g
    allowed += t * 1e-6 * g.abs().clamp_min(1.0) + EPSILON * scores.abs()
    index, log_p = case.sample(temperature, seeds, positions)
    own, own_allowed = scores.gather(1, index[:, None]), allowed.gather(1, index[:, None])
    assert (scores <= own + own_allowed + allowed).all()
    exact = z.log_softmax(-1).gather(1, index[:, None])[:, 0]
    plain_log_p = case.logits(torch.float32).log_softmax(-1).gather(1, index[:, None])[:, 0]
    # an error in every logit moves the sum of all by no more than the largest of them
    spread = allowed.max(1).values + 8 * EPSILON * (z.max(1).values - exact).abs().clamp_min(1.0)
    assert ((log_p - exact).abs() <= 2 * (plain_log_p - exact).abs() + own_allowed[:, 0] + spread).all()
    return index


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_samples(rows: int, dtype: torch.dtype) -> None:
    """Greedy rows among them, and temperatures from freezing to hot."""
    case = make(rows, 144, 150, dtype, softcap=5.0 if rows % 2 else None, with_bias=rows > 16)
    temperature = torch.tensor([0.7, 0.0, 1.0, 1e-4, 30.0]).repeat(rows)[:rows]
    seeds = torch.tensor([0, 2**63 - 1, 12345, 2**40 + 3]).repeat(rows)[:rows]
    index = check_samples(case, temperature, seeds, torch.arange(rows) * 7)
    greedy = temperature == 0
    assert torch.equal(index[greedy], case.argmax()[0].cpu()[greedy])


def test_the_reference_agrees() -> None:
    """Bit by bit the same tokens, where no two scores are close: float64 and float32 noise are of the same integers."""
    case = make(64, 16, 400, torch.float32)
    vectors = torch.full((64,), 2.0), torch.arange(64) % 5, torch.arange(64)
    weight = plain(case.matrix)
    temperature, seeds, positions = (x.to(DEVICE) for x in vectors)
    expected, log_p = linear_sample(
        case.hidden.to(DEVICE), weight, temperature=temperature, seeds=seeds, positions=positions,
        log_probability=True, impl="torch",
    )  # fmt: skip
    index, found = case.sample(*vectors)
    assert torch.equal(index, expected.cpu())
    assert log_p is not None
    torch.testing.assert_close(found, log_p.cpu(), rtol=1e-5, atol=1e-5)


def test_noise_alone_is_within_its_bound() -> None:
    """With logits of zero the token is the argmax of the noise; its size shows in a vocabulary of two, one shifted."""
    rows = 400
    seeds, positions = torch.arange(rows) * 977, torch.arange(rows)
    g = gumbel_noise(seeds, positions, 2)
    for side in (-1.0, 1.0):
        # a bias that all but closes the gap, from below and from above, decides as the exact noise does
        gap = (g[:, 0] - g[:, 1]).abs()
        margin = 2e-6 * g.abs().amax(1).clamp_min(1.0)
        hidden = torch.stack((gap + side * 2 * margin, torch.zeros(rows, dtype=torch.float64)), 1).float()
        behind = (g[:, 1] < g[:, 0]).long()  # the token with less noise
        hidden = torch.where(behind[:, None] == 0, hidden, hidden.flip(1))
        case = Case(hidden, torch.eye(2), None, None)
        index, _ = case.sample(torch.ones(rows), seeds, positions)
        expected = behind if side > 0 else 1 - behind
        assert torch.equal(index, expected)


def test_bits_do_not_depend_on_the_other_rows() -> None:
    """Of one tile: rows of it are computed alike wherever they stand."""
    case = make(60, 48, 300, torch.bfloat16, softcap=5.0)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    index, value = case.argmax()
    again = Case(case.hidden[order], case.matrix, None, 5.0).argmax()
    assert torch.equal(again[0], index[order])
    assert torch.equal(again[1], value[order])


def test_refused_inputs() -> None:
    case = make(3, 8, 20, torch.float32)
    x, weight, matrix = case.hidden.to(DEVICE), plain(case.matrix), case.matrix.to(DEVICE)
    packed = LinearWeight(torch.zeros(1, 8, 32, device=DEVICE), 20, 8, packed=True)
    count = torch.tensor([2], device=DEVICE)
    for arguments in (
        (x, packed), (x.half(), weight), (x[:, :7], weight), (x.T.contiguous().T, weight), (x, weight, matrix[:19, 0]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r'impl="triton" cannot run here: it needs contiguous inputs'):
            linear_argmax(*arguments, impl="triton")
    with pytest.raises(ValueError, match="int32 row_count"):
        linear_argmax(x, weight, row_count=count, impl="triton")
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        linear_argmax(x.double(), plain(case.matrix.double()), impl="triton")
    index = torch.arange(3, device=DEVICE)
    with pytest.raises(ValueError, match="temperature float32, seeds and positions int64"):
        linear_sample(x, weight, temperature=index.double(), seeds=index, positions=index, impl="triton")
    with pytest.raises(ValueError, match="one entry per row"):
        linear_sample(x, weight, temperature=x[:2, 0], seeds=index, positions=index)


def test_tiles_are_what_the_rows_ask_for() -> None:
    """The product with the weight in front has its rows as the narrow side."""
    for rows in (1, 16, 17, 32, 33, 64, 65, 128, 129, 2048):
        for dtype in DTYPES:
            t = logits_tile.tiles(rows, 128, dtype)
            assert t.rows >= min(rows, 64)
            assert t.parts == 1 or not t.weight_first
