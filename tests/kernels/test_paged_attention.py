import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import kv_cache_shapes, paged_attention
from engine.kernels.native import Impl
from tests.kernels.references import PagedCase, assert_accurate, paged_case

SPANS = ((0, 1), (0, 33), (31, 1), (31, 2), (40, 24), (64, 70), (95, 0), (127, 13))  # (first position, rows)
FEW_SPANS = ((0, 3), (29, 5), (70, 14), (100, 1))


def attend(case: PagedCase, *, scale: float, softcap: float | None, window: int, impl: Impl) -> Tensor:
    return paged_attention(
        case.q, case.k_cache, case.v_cache, case.block_table, case.row_start, case.first_position,
        heads=case.heads, scale=scale, softcap=softcap, window=window, impl=impl,
    )  # fmt: skip


@functools.cache
def expected(
    spans: tuple[tuple[int, int], ...], kv_heads: int, group: int, head_dim: int, softcap: float | None, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    case = paged_case(spans, kv_heads, group, head_dim)
    settings = {"scale": head_dim**-0.5, "softcap": softcap, "window": window}
    return (
        case.exact(torch.float64, **settings),
        case.exact(torch.float32, **settings),
        case.exact(torch.float32, **settings, absolute=True),
    )


def check(
    spans: tuple[tuple[int, int], ...], kv_heads: int, group: int, head_dim: int, softcap: float | None, window: int,
    impl: Impl,
) -> None:  # fmt: skip
    case = paged_case(spans, kv_heads, group, head_dim)
    out = attend(case, scale=head_dim**-0.5, softcap=softcap, window=window, impl=impl)
    assert_accurate(out, *expected(spans, kv_heads, group, head_dim, softcap, window))


@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 80, 128])
@pytest.mark.parametrize(("kv_heads", "group"), [(2, 1), (1, 2), (2, 3), (1, 8)])
def test_heads(kv_heads: int, group: int, head_dim: int, impl: Impl) -> None:
    """Stale NaN in unwritten positions and in pages of nobody does not reach the result."""
    check(FEW_SPANS, kv_heads, group, head_dim, None, 0, impl)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [0, 1, 5, 31, 32, 33, 1000])
def test_windows_and_soft_cap(window: int, softcap: float | None, impl: Impl) -> None:
    check(SPANS, 1, 2, 24, softcap, window, impl)


@pytest.mark.parametrize(("softcap", "window"), [(None, 0), (2.0, 33)])
def test_layout_of_gpus(softcap: float | None, window: int) -> None:
    """The reference reads it too, and leaves rows of nobody alone."""
    case = paged_case(SPANS, 2, 3, 24, layout="nhd")
    for extra in (0, 3):
        out = paged_attention(
            torch.cat((case.q, case.q[:extra])), case.k_cache, case.v_cache, case.block_table, case.row_start,
            case.first_position, heads=6, scale=24**-0.5, softcap=softcap, window=window, layout="nhd",
        )  # fmt: skip
        assert_accurate(out[: len(case.q)], *expected(SPANS, 2, 3, 24, softcap, window))


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65, 96])
def test_lengths_around_the_edges_of_pages(length: int, impl: Impl) -> None:
    """As one last row, as a prompt and as a draft behind one."""
    check(((length - 1, 1), (0, length), (length, 7)), 1, 3, 16, None, 0, impl)


def test_many_sequences(impl: Impl) -> None:
    check(tuple((7 * i % 67, 1 + 11 * i % 5) for i in range(24)), 2, 2, 16, None, 0, impl)


@pytest.mark.parametrize("scale", [4.0, 30.0])
def test_scores_far_apart(scale: float, impl: Impl) -> None:
    """One key takes nearly all of the weight, and the maximum rises over the pages."""
    case = paged_case(FEW_SPANS, 1, 2, 16)
    out = attend(case, scale=scale, softcap=None, window=0, impl=impl)
    settings = {"scale": scale, "softcap": None, "window": 0}
    exact, plain = case.exact(torch.float64, **settings), case.exact(torch.float32, **settings)
    assert_accurate(out, exact, plain, case.exact(torch.float32, **settings, absolute=True))


def test_queries_inside_a_fused_qkv(impl: Impl) -> None:
    """The columns behind the queries have no influence."""
    fused = paged_case(FEW_SPANS, 2, 3, 24, extra_columns=2 * 2 * 24)
    columns = fused.heads * 24
    settings = {"scale": 0.2, "softcap": None, "window": 0}
    out = attend(fused, **settings, impl=impl)
    fused.q[:, columns:] = float("nan")
    assert torch.equal(attend(fused, **settings, impl=impl), out)
    exact, plain = fused.exact(torch.float64, **settings), fused.exact(torch.float32, **settings)
    assert_accurate(out, exact, plain, fused.exact(torch.float32, **settings, absolute=True))


def test_no_rows(impl: Impl) -> None:
    case = paged_case(((5, 0), (0, 0)), 1, 2, 16)
    assert attend(case, scale=1.0, softcap=None, window=0, impl=impl).shape == (0, 32)


@functools.cache
def all_rows(instruction_set: str, group: int, head_dim: int, softcap: float | None, window: int) -> Tensor:
    case = paged_case(SPANS, 1, group, head_dim)
    return attend(case, scale=0.3, softcap=softcap, window=window, impl="cpp")


@st.composite
def parts(draw: st.DrawFn) -> tuple[int, int, int]:
    """A sequence of SPANS and the first and last + 1 of some of its rows."""
    sequence = draw(st.sampled_from([s for s, (_, rows) in enumerate(SPANS) if rows]))
    rows = SPANS[sequence][1]
    first = draw(st.integers(0, rows - 1))
    return sequence, first, draw(st.one_of(st.just(first + 1), st.integers(first + 1, rows)))


@given(
    chosen=st.lists(parts(), min_size=1, max_size=8, unique_by=lambda part: part[0]),
    shape=st.sampled_from([(1, 16), (2, 80), (3, 24), (8, 8)]),
    softcap=st.sampled_from([None, 5.0]),
    window=st.sampled_from([0, 1, 5, 32, 33]),
)
def test_rows_keep_their_bits_in_any_window_of_any_batch(
    instruction_set: str,
    chosen: list[tuple[int, int, int]],
    shape: tuple[int, int],
    softcap: float | None,
    window: int,
) -> None:
    """Alone, in a part of its window, beside other sequences, and whatever the later positions hold."""
    case = paged_case(SPANS, 1, *shape)
    together = all_rows(instruction_set, *shape, softcap, window)
    bounds, first_position = case.row_start.tolist(), case.first_position.tolist()
    k_cache, v_cache = case.k_cache.clone(), case.v_cache.clone()
    rows: list[int] = []
    row_start, first = [0], []
    for sequence, begin, end in chosen:
        rows += range(bounds[sequence] + begin, bounds[sequence] + end)
        row_start.append(len(rows))
        first.append(first_position[sequence] + begin)
        for position in range(first_position[sequence] + end, first_position[sequence] + SPANS[sequence][1]):
            page, offset = int(case.block_table[sequence, position // 32]), position % 32
            k_cache[page, ..., offset] = float("nan")
            v_cache[page, :, offset, : shape[1]] = float("nan")
    part = paged_attention(
        case.q[rows], k_cache, v_cache, case.block_table[[sequence for sequence, _, _ in chosen]],
        torch.tensor(row_start, dtype=torch.int32), torch.tensor(first, dtype=torch.int32),
        heads=case.heads, scale=0.3, softcap=softcap, window=window, impl="cpp",
    )  # fmt: skip
    assert torch.equal(part, together[rows])


def test_rows_keep_their_bits_with_any_number_of_threads(instruction_set: str) -> None:
    together = all_rows(instruction_set, 2, 80, None, 0)
    before = torch.get_num_threads()
    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            again = attend(paged_case(SPANS, 1, 2, 80), scale=0.3, softcap=None, window=0, impl="cpp")
            assert torch.equal(again, together)
    finally:
        torch.set_num_threads(before)


def test_other_layouts_take_the_reference(instruction_set: str) -> None:
    case = paged_case(FEW_SPANS, 1, 2, 24)
    head_dim, pages = 24, case.k_cache.shape[0]
    wide = case.q.repeat(1, 2)[:, : case.q.shape[1]]
    unpadded = case.v_cache[..., :head_dim].contiguous()  # rows that are no multiple of a vector
    replacements: list[tuple[int, Tensor]] = [
        (0, wide),
        (0, case.q.double()),
        (1, case.k_cache.bfloat16()),
        (2, unpadded),
        (3, case.block_table.long()),
        (4, case.row_start.long()),
        (5, case.first_position.long()),
    ]
    assert kv_cache_shapes(pages, 1, head_dim) == (case.k_cache.shape, case.v_cache.shape)
    for i, other in replacements:
        arguments = [case.q, case.k_cache, case.v_cache, case.block_table, case.row_start, case.first_position]
        arguments[i] = other
        with pytest.raises(
            ValueError, match=r'impl="cpp" cannot run here: it needs contiguous float32 inputs and int32'
        ):
            paged_attention(*arguments, heads=2, scale=0.3, impl="cpp")
        out = paged_attention(*arguments, heads=2, scale=0.3)
        assert torch.equal(out, paged_attention(*arguments, heads=2, scale=0.3, impl="torch"))
        assert out.dtype == arguments[0].dtype


def test_shapes_that_do_not_belong_together(instruction_set: str) -> None:
    case = paged_case(FEW_SPANS, 1, 2, 24)
    arguments = (case.q, case.k_cache, case.v_cache, case.block_table, case.row_start, case.first_position)
    few_columns = (case.q[:, :40].contiguous(), *arguments[1:])
    few_sequences = (*arguments[:5], case.first_position[:3])
    for wrong in (few_columns, few_sequences):
        with pytest.raises(ValueError, match="shapes that belong together"):
            paged_attention(*wrong, heads=2, scale=0.3, impl="cpp")
    with pytest.raises(RuntimeError):
        paged_attention(*few_columns, heads=2, scale=0.3)


@pytest.mark.parametrize("softcap", [-1.0, float("nan"), float("inf")])
def test_soft_caps_that_are_none_are_refused(softcap: float, impl: Impl) -> None:
    with pytest.raises(
        ValueError, match=f"softcap must be positive and finite, or None or 0.0 for no cap, got {softcap}"
    ):
        attend(paged_case(FEW_SPANS, 1, 2, 24), scale=1.0, softcap=softcap, window=0, impl=impl)


def test_unknown_implementation() -> None:
    with pytest.raises(ValueError, match="impl must be"):
        attend(paged_case(FEW_SPANS, 1, 2, 24), scale=1.0, softcap=None, window=0, impl="fast")  # type: ignore[arg-type]


def test_a_later_guess_that_overflows_leaves_earlier_rows_alone(impl: str) -> None:
    """A row's weight for positions behind it is 0, and 0 * NaN would be NaN."""
    q = torch.randn(4, 32)
    k, v = torch.randn(1, 2, 16, 32), torch.randn(1, 2, 32, 16)
    shared = {"heads": 2, "scale": 0.25, "impl": impl}
    table, first = torch.tensor([[0]], dtype=torch.int32), torch.tensor([7], dtype=torch.int32)
    v[0, :, 9] = float("nan")
    out = paged_attention(q, k, v, table, torch.tensor([0, 4], dtype=torch.int32), first, **shared)
    alone = paged_attention(q[:2], k, v, table, torch.tensor([0, 2], dtype=torch.int32), first, **shared)
    assert out[:2].isfinite().all()
    assert out[2:].isnan().all()
    torch.testing.assert_close(out[:2], alone)
