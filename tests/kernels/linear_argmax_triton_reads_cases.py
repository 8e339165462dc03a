"""What the Triton projections with argmax and with sampling read, and where: run as linear_argmax_triton_cases.py is."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import LinearWeight, linear_argmax, linear_sample
from engine.kernels.gpu.logits_tile import FEW_ROWS, MANY_ROWS, SMALL_FEW_ROWS, SMALL_MANY_ROWS, Tiles, product_tile
from engine.kernels.native import native
from tests.kernels.linear_argmax_triton_cases import Case, check, make, plain
from tests.kernels.references import randn
from tests.kernels.triton_device import DEVICE, INTERPRETED, beyond_32_bits

if INTERPRETED:
    from tests.kernels.triton_interpreter import recorded_reads

ROWS, D, V = 140, 32, 200
IMPLEMENTATIONS = ["torch", "triton", "cpp"]


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter's loads can be counted")
@pytest.mark.parametrize(
    ("sampled", "per_tile", "columns"), [(False, 2, 256), (True, 5, 128)], ids=["argmax", "sample"]
)
@pytest.mark.parametrize("count", [0, 1, 128, 130, 300])
def test_only_rows_in_use_are_read(count: int, sampled: bool, per_tile: int, columns: int) -> None:
    """Nor is the weight for others: once for each tile of 128 rows in use, so that without any it stays unread."""
    case, row_count = make(ROWS, D, V, torch.bfloat16), torch.tensor([count], dtype=torch.int32)
    vectors = torch.full((ROWS,), 0.7), torch.arange(ROWS), torch.arange(ROWS)
    with recorded_reads() as reads:
        if sampled:
            case.sample(*vectors, row_count)
        else:
            case.argmax(row_count)
    used, column_tiles = min(count, ROWS), triton.cdiv(V, columns)
    row_tiles = triton.cdiv(used, 128)
    assert {at // D for at in reads.of(case.hidden)} == set(range(used))
    assert len(reads.of(case.matrix)) == row_tiles * column_tiles * columns * D
    for vector in vectors:
        assert set(reads.of(vector)) == (set(range(used)) if sampled else set())
    known = sum(len(reads.of(x)) for x in (case.hidden, case.matrix, row_count, *vectors))
    assert reads.count() - known == used * column_tiles * per_tile, "what tiles left for the second kernel"


def both(impl: str, softcap: float | None, hidden: Tensor, matrix: Tensor) -> list[Tensor]:
    """Argmax and value by ``impl``, and where it samples, token and log-probability."""
    rows = len(hidden)
    if impl == "cpp":
        return list(linear_argmax(hidden, LinearWeight.from_dense(matrix), softcap=softcap, impl="cpp"))
    vectors = {"temperature": torch.ones(rows), "seeds": torch.arange(rows), "positions": torch.arange(rows)}
    there, weight = hidden.to(DEVICE), plain(matrix)
    index, log_p = linear_sample(
        there, weight, **{name: x.to(DEVICE) for name, x in vectors.items()}, softcap=softcap, log_probability=True,
        impl=impl,
    )  # fmt: skip
    assert log_p is not None
    return [*linear_argmax(there, weight, softcap=softcap, impl=impl), index, log_p]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_soft_cap_of_zero_is_none(impl: str) -> None:
    """As configs of models write it. Logits of tens: a cap of 1 would make them equal, and the lowest index win."""
    if impl == "cpp" and native() is None:
        pytest.skip("the C++ extension is not built")
    hidden, matrix = randn(0, 5, 16), 8 * randn(1, 300, 16)
    for found, expected in zip(both(impl, 0.0, hidden, matrix), both(impl, None, hidden, matrix), strict=True):
        assert torch.equal(found, expected)
    assert not torch.equal(both(impl, 1.0, hidden, matrix)[1], both(impl, None, hidden, matrix)[1])
    check(Case(hidden, matrix, None, 0.0))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("softcap", [-1.0, float("nan"), float("inf")])
def test_other_soft_caps_are_refused(softcap: float, impl: str) -> None:
    with pytest.raises(
        ValueError, match=f"softcap must be positive and finite, or None or 0.0 for no cap, got {softcap}"
    ):
        both(impl, softcap, randn(0, 2, 16), randn(1, 30, 16))


@triton.jit
def product_kernel(
    hidden: tl.tensor, weight: tl.tensor, rows: tl.tensor, columns: tl.tensor, out: tl.tensor, d: tl.tensor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, WEIGHT_FIRST: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:  # fmt: skip
    """The product of chosen rows and columns, which a whole projection would take billions of operations to come to."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    z = product_tile(
        hidden,
        weight,
        tl.load(rows + row),
        tl.load(columns + column),
        d,
        ROWS,
        COLUMNS,
        DEPTH,
        EVEN,
        WEIGHT_FIRST,
        WIDEN,
    )
    tl.store(out + row[:, None] * COLUMNS + column[None, :], z)


def zeros(rows: int, d: int) -> Tensor:
    """In bfloat16; on a CPU they take memory only where they are touched."""
    if DEVICE == "cpu":
        return torch.from_numpy(np.zeros((rows, d), np.int16)).view(torch.bfloat16)
    return torch.zeros(rows, d, dtype=torch.bfloat16, device=DEVICE)


@pytest.mark.parametrize("tile", [FEW_ROWS[16], SMALL_FEW_ROWS, SMALL_MANY_ROWS, MANY_ROWS], ids=str)
@pytest.mark.parametrize("large", ["hidden", "weight"])
def test_tiles_above_two_to_the_31(large: str, tile: Tiles) -> None:
    """Elements of the hidden rows or of the weight. Both kernels read these by ``product_tile`` alone."""
    d, most = 4096, (1 << 19) + 300
    generator = torch.Generator().manual_seed(0)
    ends = {"hidden": tile.rows, "weight": tile.columns}
    tensors, indices, values = {}, {}, {}
    for name, count in ends.items():
        size = most if name == large else count
        indices[name] = torch.randperm(count, generator=generator) + (size - count)
        values[name] = torch.randint(-2, 3, (count, d), generator=generator).bfloat16()  # every sum of these is exact
        tensors[name] = zeros(size, d)
        tensors[name][indices[name].to(DEVICE)] = values[name].to(DEVICE)
    out = torch.empty(tile.rows, tile.columns, device=DEVICE)
    options = tile.options(tensors["hidden"])
    del options["PARTS"]
    rows, columns = (indices[name].int().to(DEVICE) for name in ends)
    product_kernel[(1,)](tensors["hidden"], tensors["weight"], rows, columns, out, d, **options)
    assert torch.equal(out.cpu(), values["hidden"].float() @ values["weight"].float().T)


@beyond_32_bits
@pytest.mark.parametrize("rows", [1, 129])
def test_weights_above_two_to_the_31(rows: int) -> None:
    d, v = 4096, (1 << 19) + 5
    weight = plain(zeros(v, d))
    hidden = randn(0, rows, d, dtype=torch.bfloat16).to(DEVICE)
    weight.data[-1] = hidden[-1]
    index, value = linear_argmax(hidden, weight, impl="triton")
    assert index[-1] == v - 1
    torch.testing.assert_close(value[-1], hidden[-1].float().square().sum(), rtol=1e-5, atol=0.0)
