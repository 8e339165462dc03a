import pytest
import torch
from torch import Tensor

from engine.kernels.consistency_loss.native_products import DEPTH, FEW_ROWS, NativeProducts, products
from engine.kernels.native import Native, native
from tests.kernels import references
from tests.kernels.references import assert_accurate, multiplied, randn

TYPES = (torch.float32, torch.bfloat16, torch.float16)
# rows of the group, d, rows of the head: around tiles, panels, pairs and blocks of what is added up
SHAPES = [
    (1, 1, 2),
    (2, 3, 31),
    (13, 33, 32),
    (14, 32, 65),
    (29, 2 * DEPTH + 1, 100),
    (15, 385, 33),
    (70, 257, 40),
    (401, 7, 129),
]


def accurate(actual: Tensor, x: Tensor, matrix: Tensor, start: Tensor | None = None) -> None:
    """actual = start + x matrix^T, added up in float32."""
    start = torch.zeros(()) if start is None else start
    exact = references.linear(x.double(), matrix.double()) + start.double()
    plain = references.linear(x, matrix) + start
    assert_accurate(actual, exact, plain, references.linear(x.abs(), matrix.abs()) + start.abs())


@pytest.fixture(params=[False, True], ids=["", "outruns"])
def library(request: pytest.FixtureRequest, instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> Native:
    """Both choices of float32 products, whoever made the processor."""
    monkeypatch.setattr(Native, "outruns_blas", property(lambda self: request.param))
    found = native()
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("rows", "d", "count"), SHAPES)
def test_products(rows: int, d: int, count: int, dtype: torch.dtype, instruction_set: str, library: Native) -> None:
    """Blocks of the head one after the other, the last one smaller; outputs and gradients are parts of larger matrices."""
    hidden, head = randn(0, rows, d, dtype=dtype).float(), randn(1, 2 * count - 1, d, dtype=dtype)
    work = products(hidden, dtype, count, library)
    few = rows <= FEW_ROWS
    expected = few or library.outruns_blas or (dtype is torch.bfloat16 and instruction_set == "avx512_bf16")
    assert isinstance(work, NativeProducts) == expected
    logits = torch.full((rows, len(head)), torch.nan)
    for block in (slice(0, count), slice(count, 2 * count - 1)):
        part = head[block].float()
        gradient = randn(2, rows, count + 3)[:, : len(part)]
        seen = multiplied(gradient, dtype)
        work.take(head[block])
        grad_hidden = start = randn(3, rows, d)
        grad_hidden = grad_hidden.clone()
        work.add_to_hidden(gradient, grad_hidden)
        accurate(grad_hidden, seen, part.T, start)
        some = slice(rows // 2, rows)
        work.logits(some, logits[some, block])
        work.logits(slice(0, rows // 2), logits[: rows // 2, block])
        accurate(logits[:, block], hidden, part)
        out = torch.full((len(part), d), torch.nan, dtype=dtype)
        work.head_gradient(gradient, out, accumulate=False)
        if dtype is torch.float32:
            accurate(out, seen.T, hidden.T)
            before = out.clone()
            work.head_gradient(gradient, out, accumulate=True)
            accurate(out, seen.T, hidden.T, before)
        else:
            exact = seen.T.double() @ hidden.double()
            magnitude = seen.T.double().abs() @ hidden.double().abs()
            rounding = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal
            assert ((out.double() - exact).abs() <= rounding + 1e-5 * magnitude).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_row_of_logits_has_the_same_bits_beside_any_others(dtype: torch.dtype, library: Native) -> None:
    hidden, head = randn(0, 60, 385, dtype=dtype).float(), randn(1, 100, 385, dtype=dtype)
    work = products(hidden, dtype, 100, library)
    work.take(head)
    together, alone = torch.empty(60, 100), torch.empty(60, 100)
    work.logits(slice(None), together)
    for row in range(60):
        work.logits(slice(row, row + 1), alone[row : row + 1])
    assert torch.equal(alone, together)
