import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import LinearWeight, embedding, linear, native_name
from engine.kernels.native import Impl
from tests.kernels import references
from tests.kernels.references import assert_within, randn, tolerance

# around tiles of any width and one block of rows
ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 15, 24, 25, 28, 29, 95, 96, 97, 200)
DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def case(n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return randn(0, max(ROWS), k), randn(1, n, k, dtype=dtype), randn(2, n)


@functools.cache
def expected(n: int, k: int, dtype: torch.dtype, kernels: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The exact result and the tolerance of all rows, without and with the bias."""
    x, matrix, bias = case(n, k, dtype)
    x = references.multiplied(x, dtype)
    exact = references.linear(x.double(), matrix.double())
    plain = references.linear(x, matrix.float())
    magnitude = references.linear(x.abs(), matrix.float().abs())
    with_bias = exact + bias.double()
    allowed = tolerance(with_bias, plain + bias, magnitude + bias.abs())
    return (exact, tolerance(exact, plain, magnitude)), (with_bias, allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("k", [1, 123, 383, 384, 385, 1000])
@pytest.mark.parametrize("n", [1, 31, 33, 507])
def test_linear_is_accurate(n: int, k: int, dtype: torch.dtype, impl: Impl) -> None:
    x, matrix, bias = case(n, k, dtype)
    (exact, allowed), (exact_with_bias, allowed_with_bias) = expected(n, k, dtype, native_name())
    weight = LinearWeight.from_dense(matrix)
    assert weight.packed == (impl == "cpp")
    for m in ROWS:
        y = linear(x[:m], weight, bias, impl=impl)
        assert y.dtype == torch.float32
        assert_within(y, exact_with_bias[:m], allowed_with_bias[:m])
    for m in (1, 13):
        assert_within(linear(x[:m], weight, impl=impl), exact[:m], allowed[:m])


def test_what_is_multiplied_with_bfloat16(instruction_set: str) -> None:
    """Ties to even, up to infinity, NaN: what PyTorch makes of them, or the numbers as they are."""
    tie, unit = 2.0**-8, 2.0**-7
    ends = [torch.finfo(t).max * s for t in (torch.float32, torch.bfloat16) for s in (1, -1)]
    values = [1 + tie, 1 + unit + tie, -1 - tie, 1 + tie + 2**-20, 0.0, *ends, torch.inf, -torch.inf, torch.nan]
    x = torch.cat((torch.tensor(values), randn(0, 300)))[:, None]
    weight = LinearWeight.from_dense(torch.ones(1, 1, dtype=torch.bfloat16))
    expected = references.multiplied(x, torch.bfloat16)
    torch.testing.assert_close(linear(x, weight, impl="cpp"), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_reads_packed_weights(dtype: torch.dtype, instruction_set: str) -> None:
    x, matrix, bias = case(33, 123, dtype)
    packed, plain = LinearWeight.from_dense(matrix), LinearWeight(matrix, 33, 123, packed=False)
    assert torch.equal(linear(x, packed, bias, impl="torch"), linear(x, plain, bias, impl="torch"))
    ids = torch.tensor([32, 0, 32])
    assert torch.equal(embedding(ids, packed, 0.3, impl="torch"), embedding(ids, packed, 0.3, impl="cpp"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_written_in_pieces(dtype: torch.dtype, impl: Impl) -> None:
    """Pieces in any order, across panels, at rows that are no multiple of 32; each is cast to the weight's dtype."""
    matrix = randn(0, 150, 37)
    weight = LinearWeight.allocate(150, 37, dtype, torch.device("cpu"))
    for first, last in ((119, 150), (0, 7), (7, 31), (33, 119), (31, 33), (5, 5)):
        piece = matrix.T.contiguous().T[first:last]  # not contiguous
        weight.write(first, piece)
    assert (weight.rows, weight.columns) == (150, 37)
    assert torch.equal(weight.dense(), matrix.to(dtype))
    weight.write(40, torch.zeros(3, 37))
    matrix[40:43] = 0
    assert torch.equal(weight.dense(), matrix.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 5), (32, 5), (33, 1), (96, 17), (0, 4)])
def test_dense_round_trip(n: int, k: int, dtype: torch.dtype, impl: Impl) -> None:
    matrix = randn(0, n, k, dtype=dtype)
    assert torch.equal(LinearWeight.from_dense(matrix).dense(), matrix)


@pytest.mark.parametrize(
    ("first_row", "shape"),
    [(0, (4, 8)), (0, (4, 6)), (0, (41, 7)), (38, (3, 7)), (41, (0, 7)), (-1, (2, 7)), (0, (7,)), (0, (1, 4, 7))],
)
def test_write_refuses_what_does_not_fit(first_row: int, shape: tuple[int, ...], impl: Impl) -> None:
    weight = LinearWeight.from_dense(randn(0, 40, 7))
    before = weight.dense().clone()
    with pytest.raises(ValueError, match=r"a \[40, 7\] weight cannot take"):
        weight.write(first_row, torch.zeros(shape))
    assert torch.equal(weight.dense(), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype: torch.dtype, impl: Impl) -> None:
    matrix = randn(0, 101, 37, dtype=dtype)
    weight = LinearWeight.from_dense(matrix)
    ids = torch.tensor([100, 0, 31, 32, 33, 31, 64, 96])
    rows = embedding(ids, weight, impl=impl)
    assert torch.equal(rows, matrix[ids].to(rows.dtype))
    scaled = embedding(ids, weight, 1.7, impl=impl)
    assert torch.equal(scaled, matrix[ids].to(scaled.dtype) * 1.7)
    assert rows.dtype == (torch.float32 if impl == "cpp" else dtype)
    assert embedding(ids[:0], weight, impl=impl).shape == (0, 37)


@functools.cache
def all_rows(instruction_set: str, n: int, k: int, dtype: torch.dtype) -> tuple[LinearWeight, Tensor]:
    x, matrix, bias = case(n, k, dtype)
    weight = LinearWeight.from_dense(matrix)
    return weight, linear(x, weight, bias, impl="cpp")


@given(
    rows=st.lists(st.integers(0, 199), min_size=1, max_size=200),
    shape=st.sampled_from([(200, 123), (33, 1000), (1, 384), (70, 385)]),
    dtype=st.sampled_from(DTYPES),
)
def test_rows_keep_their_bits_in_any_batch(
    instruction_set: str, rows: list[int], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, _, bias = case(*shape, dtype)
    weight, together = all_rows(instruction_set, *shape, dtype)
    assert torch.equal(linear(x[rows], weight, bias, impl="cpp"), together[rows])
    assert torch.equal(linear(x[rows[:1]], weight, bias, impl="cpp"), together[rows[:1]])


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_rows_keep_their_bits_with_any_number_of_threads(threads: int, instruction_set: str) -> None:
    x, matrix, bias = case(507, 385, torch.float32)
    weight = LinearWeight.from_dense(matrix)
    together = linear(x, weight, bias, impl="cpp")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for m in (1, 13, 200):
            assert torch.equal(linear(x[:m], weight, bias, impl="cpp"), together[:m])
    finally:
        torch.set_num_threads(before)


@given(rows=st.lists(st.integers(0, 15), min_size=1, max_size=16))
def test_rows_of_the_reference_keep_their_bits_in_up_to_16(rows: list[int]) -> None:
    """All of these are padded to one shape; nothing is promised beyond."""
    x, matrix, bias = case(507, 384, torch.float32)
    weight = LinearWeight(matrix, 507, 384, packed=False)
    together = linear(x[:16], weight, bias)
    assert torch.equal(linear(x[rows], weight, bias), together[rows])


def test_wrong_shapes(impl: Impl) -> None:
    """Never a read beyond the tensors: impl="auto" hands over to the reference, which raises."""
    weight = LinearWeight.from_dense(randn(0, 40, 7))
    x, bias = randn(1, 3, 7), randn(2, 40)
    for arguments in ((x[:, :6].contiguous(), weight), (randn(1, 3, 8), weight, bias), (x, weight, bias[:39])):
        with pytest.raises(RuntimeError):
            linear(*arguments)
        if impl == "cpp":
            with pytest.raises(ValueError, match=r'impl="cpp" cannot run here: it needs a packed weight'):
                linear(*arguments, impl="cpp")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_take_the_reference(dtype: torch.dtype, instruction_set: str) -> None:
    weight = LinearWeight.from_dense(randn(0, 40, 7))
    x = randn(1, 3, 7, dtype=dtype)
    assert torch.equal(linear(x, weight), linear(x, weight, impl="torch"))
    with pytest.raises(ValueError, match="it needs a packed weight and contiguous float32 inputs"):
        linear(x, weight, impl="cpp")


def test_inputs_that_are_not_contiguous_take_the_reference(instruction_set: str) -> None:
    weight = LinearWeight.from_dense(randn(0, 40, 7))
    x = randn(1, 7, 3).T
    assert torch.equal(linear(x, weight), linear(x, weight, impl="torch"))
    with pytest.raises(ValueError, match="contiguous float32"):
        linear(x, weight, impl="cpp")


@pytest.mark.parametrize("ids", [torch.tensor([1, 2], dtype=torch.int32), torch.arange(6)[::2]])
def test_ids_of_other_layouts_take_the_reference(ids: Tensor, instruction_set: str) -> None:
    weight = LinearWeight.from_dense(randn(0, 40, 7))
    assert torch.equal(embedding(ids, weight), weight.dense()[ids])
    with pytest.raises(ValueError, match="contiguous int64 ids"):
        embedding(ids, weight, impl="cpp")


def test_plain_weights_cannot_run_in_cpp(instruction_set: str) -> None:
    weight = LinearWeight(randn(0, 40, 7), 40, 7, packed=False)
    with pytest.raises(ValueError, match="a packed weight"):
        linear(randn(1, 3, 7), weight, impl="cpp")
    with pytest.raises(ValueError, match="a packed weight"):
        embedding(torch.tensor([1]), weight, impl="cpp")


def test_unknown_implementation() -> None:
    weight = LinearWeight.from_dense(randn(0, 40, 7))
    with pytest.raises(ValueError, match='impl must be "auto", "torch", "cpp" or "triton", got'):
        linear(randn(1, 3, 7), weight, impl="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="impl must be"):
        embedding(torch.tensor([1]), weight, impl="")  # type: ignore[arg-type]
