import functools
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import LinearWeight, linear_argmax
from engine.kernels import linear as linear_kernel
from engine.kernels.linear_argmax import logits
from engine.kernels.native import Impl
from tests.kernels import references
from tests.kernels.references import randn, tolerance

INFINITY, NAN = float("inf"), float("nan")
ROWS = (0, 1, 2, 12, 13, 97)
DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def case(n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return randn(0, max(ROWS), k), randn(1, n, k, dtype=dtype), randn(2, n, scale=3.0)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("n", "k"), [(1, 3), (31, 123), (33, 1), (507, 64), (2049, 385)])
def test_index_and_value(
    n: int, k: int, dtype: torch.dtype, with_bias: bool, softcap: float | None, impl: Impl
) -> None:
    """The index is that of the float64 logits, or of one that float32 cannot tell from it."""
    x, matrix, bias = case(n, k, dtype)
    bias = bias if with_bias else torch.zeros(n)
    seen = references.multiplied(x, dtype)
    exact = references.soft_capped(references.linear(seen.double(), matrix.double(), bias.double()), softcap)
    plain = references.soft_capped(references.linear(seen, matrix.float(), bias), softcap)
    # the cap has a slope of at most 1
    allowed = tolerance(exact, plain, references.linear(x.abs(), matrix.float().abs(), bias.abs()))
    weight = LinearWeight.from_dense(matrix)
    for m in ROWS:
        index, value = linear_argmax(x[:m], weight, bias if with_bias else None, softcap=softcap, impl=impl)
        assert (index.dtype, value.dtype) == (torch.int64, torch.float32)
        assert index.shape == value.shape == (m,)
        for row, (i, v) in enumerate(zip(index.tolist(), value.tolist(), strict=True)):
            assert abs(v - exact[row, i]) <= allowed[row, i]
            best = references.lowest_argmax(exact[row].tolist())
            assert exact[row, best] - exact[row, i] <= allowed[row, i] + allowed[row, best]


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("copies", [(0, 1), (5, 37), (31, 32), (40, 1030), (3, 700, 2047, 2048), (1999, 2040)])
def test_the_lowest_of_equal_rows_wins(copies: tuple[int, ...], with_bias: bool, impl: Impl) -> None:
    """Within a panel, across panels and across threads; 2049 columns are 65 panels."""
    x = randn(0, 40, 64)
    matrix = randn(1, 2049, 64) * 0.1
    bias = torch.zeros(2049)
    for i in copies:
        matrix[i] = x.sign().sum(0) if i == copies[0] else matrix[copies[0]]
        bias[i] = 50.0
    if not with_bias:
        x = x * 0 + matrix[copies[0]]
    weight = LinearWeight.from_dense(matrix)
    for m in (1, 12, 40):
        index, _ = linear_argmax(x[:m], weight, bias if with_bias else None, impl=impl)
        assert index.tolist() == [copies[0]] * m


def test_the_lowest_of_equal_capped_values_wins(impl: Impl) -> None:
    """Logits far above the cap all become the cap, whatever their order before it."""
    order = [300, 7, 1500, 800, 1999]
    matrix = torch.zeros(2000, 4)
    for size, i in enumerate(order):
        matrix[i, 0] = 100.0 + size
    weight = LinearWeight.from_dense(matrix)
    x = torch.tensor([[1.0, 0, 0, 0], [50.0, 0, 0, 0], [-1.0, 0, 0, 0]]).repeat(10, 1)
    index, value = linear_argmax(x, weight, softcap=1.0, impl=impl)
    assert index.tolist() == [7, 7, 0] * 10  # with -1 everything but those is 0
    assert value.tolist() == [1.0, 1.0, 0.0] * 10
    index, value = linear_argmax(x, weight, impl=impl)
    assert index.tolist() == [1999, 1999, 0] * 10
    assert value.tolist() == [104.0, 5200.0, 0.0] * 10


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_nan_and_infinite_logits(softcap: float | None, impl: Impl) -> None:
    matrix = torch.zeros(70, 2)
    matrix[:, 0] = 1.0
    weight = LinearWeight.from_dense(matrix)
    x = torch.tensor([[NAN, 0.0], [1.0, 0.0], [-INFINITY, 0.0], [INFINITY, 0.0], [0.0, NAN]])
    index, value = linear_argmax(x, weight, softcap=softcap, impl=impl)
    assert index.tolist() == [-1, 0, 0, 0, -1]
    assert value[[0, 4]].isnan().all()
    infinity = softcap or INFINITY
    assert value[2:4].tolist() == [-infinity, infinity]
    assert value[1].item() == pytest.approx(references.soft_capped(torch.tensor(1.0), softcap).item())


def test_nan_in_some_logits_is_passed_over(impl: Impl) -> None:
    """NaN before, beside and after the largest value, where it lies in one panel or thread and where not."""
    weight = LinearWeight.from_dense(randn(0, 2000, 8) * 0.01)
    x = torch.ones(2, 8)
    for best, broken in ((0, [1, 1999]), (33, [0, 32, 34]), (1500, list(range(1500))), (5, list(range(6, 2000)))):
        bias = torch.zeros(2000)
        bias[best], bias[broken] = -1e6 if len(broken) == 1999 else 7.0, NAN
        index, value = linear_argmax(x, weight, bias, impl=impl)
        assert index.tolist() == [best] * 2
        assert not value.isnan().any()
    bias = torch.full((2000,), NAN)
    bias[1234] = -INFINITY
    index, value = linear_argmax(x, weight, bias, impl=impl)
    assert index.tolist() == [1234] * 2
    assert value.tolist() == [-INFINITY] * 2


def test_rows_of_minus_infinity(impl: Impl) -> None:
    weight = LinearWeight.from_dense(randn(0, 100, 8))
    bias = torch.full((100,), -INFINITY)
    index, value = linear_argmax(randn(1, 3, 8), weight, bias, impl=impl)
    assert index.tolist() == [0] * 3
    assert value.tolist() == [-INFINITY] * 3
    bias[77] = -1e30
    assert linear_argmax(randn(1, 3, 8), weight, bias, impl=impl)[0].tolist() == [77] * 3


def test_no_column_beyond_the_matrix_wins(impl: Impl) -> None:
    """The zeros that fill the last panel would beat negative logits."""
    weight = LinearWeight.from_dense(-torch.ones(33, 4) - torch.arange(33)[:, None])
    index, value = linear_argmax(torch.ones(13, 4), weight, impl=impl)
    assert index.tolist() == [0] * 13
    assert value.tolist() == [-4.0] * 13


@functools.cache
def all_rows(instruction_set: str, softcap: float | None) -> tuple[LinearWeight, Tensor, Tensor]:
    x, matrix, bias = case(507, 64, torch.bfloat16)
    weight = LinearWeight.from_dense(matrix)
    return weight, *linear_argmax(x, weight, bias, softcap=softcap, impl="cpp")


@given(rows=st.lists(st.integers(0, 96), min_size=1, max_size=97), softcap=st.sampled_from([None, 5.0]))
def test_rows_keep_their_bits_in_any_batch(instruction_set: str, rows: list[int], softcap: float | None) -> None:
    x, _, bias = case(507, 64, torch.bfloat16)
    weight, index, value = all_rows(instruction_set, softcap)
    some_index, some_value = linear_argmax(x[rows], weight, bias, softcap=softcap, impl="cpp")
    assert torch.equal(some_index, index[rows])
    assert torch.equal(some_value, value[rows])


def test_agrees_with_linear_to_the_bit(instruction_set: str) -> None:
    """Sampling reads the logits, greedy decoding the argmax: they must be of the same numbers."""
    x, matrix, bias = case(2049, 385, torch.float32)
    weight = LinearWeight.from_dense(matrix)
    z = linear_kernel(x, weight, bias, impl="cpp")
    assert torch.equal(logits(x, weight, bias), z)
    index, value = linear_argmax(x, weight, bias, impl="cpp")
    assert torch.equal(value, z.amax(-1))
    assert index.tolist() == [references.lowest_argmax(row) for row in z.tolist()]


def test_logits_with_a_soft_cap(impl: Impl) -> None:
    x, matrix, bias = case(507, 64, torch.float32)
    z = references.linear(x.double(), matrix.double(), bias.double())
    plain = references.soft_capped(references.linear(x, matrix, bias), 5.0)
    exact = references.soft_capped(z, 5.0)
    magnitude = references.linear(x.abs(), matrix.abs(), bias.abs())
    actual = logits(x, LinearWeight.from_dense(matrix), bias, softcap=5.0)
    references.assert_accurate(actual, exact, plain, magnitude)


def test_the_reference_works_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, matrix, bias = case(33, 1, torch.float32)
    weight = LinearWeight.from_dense(matrix)
    index, value = linear_argmax(x, weight, bias, impl="torch")
    module = sys.modules[linear_argmax.__module__]  # as an attribute of the package it is the function
    monkeypatch.setattr(module, "MAX_LOGITS_BYTES", 4 * 33 * 16)
    parts = linear_argmax(x, weight, bias, impl="torch")
    assert torch.equal(parts[0], index)
    assert torch.equal(parts[1], value)


def test_refused_inputs(instruction_set: str) -> None:
    x, matrix, bias = case(33, 1, torch.float32)
    weight = LinearWeight.from_dense(matrix)
    plain = LinearWeight(matrix, 33, 1, packed=False)
    for arguments in ((x.double(), weight), (x, plain), (x.repeat(1, 2), weight), (x, weight, bias[:32])):
        with pytest.raises(ValueError, match=r'impl="cpp" cannot run here: it needs a packed weight'):
            linear_argmax(*arguments, impl="cpp")
    with pytest.raises(RuntimeError):
        linear_argmax(x.repeat(1, 2), weight)
    with pytest.raises(ValueError, match="impl must be"):
        linear_argmax(x, weight, impl="fast")  # type: ignore[arg-type]
