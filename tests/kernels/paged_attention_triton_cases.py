"""The Triton kernels of paged attention against float64, on a GPU or, with TRITON_INTERPRET=1, on a CPU.

Not collected by default: test_triton_interpreter.py runs this file in a process of its own, bench/gpu.sh as it is.
"""

import functools
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import PAGE_SIZE, paged_attention
from engine.kernels.gpu import paged_attention as gpu
from engine.kernels.gpu.attention_plan import Plan, Tiles, chip_of, tiles
from tests.kernels.references import PagedCase, assert_accurate, paged_case, randn

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DEVICE = torch.device("cpu" if INTERPRETED else "cuda", None if INTERPRETED else 0)
HALF = torch.bfloat16
SPANS = ((0, 1), (95, 0), (0, 33), (31, 2), (64, 70), (127, 13))  # (first position, rows)
FEW_SPANS = ((29, 5), (70, 14), (100, 1))
OUT_OF_REACH = 1 << 30
"""Stands where a block table has no page: reading it would end the process."""

Spans = tuple[tuple[int, int], ...]

if INTERPRETED:
    from tests.kernels.triton_interpreter import repair

    repair()


def case_of(
    spans: Spans, kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, extra_columns: int = 0
) -> PagedCase:
    """On a CPU, where references are computed."""
    case = paged_case(spans, kv_heads, group, head_dim, extra_columns, layout="nhd").of_type(dtype)
    pages = torch.arange(case.block_table.shape[1])
    lengths = torch.tensor([first + rows for first, rows in spans])
    return replace(case, block_table=case.block_table.masked_fill(pages * PAGE_SIZE >= lengths[:, None], OUT_OF_REACH))


def attend(
    case: PagedCase, *, scale: float = 0.3, softcap: float | None = None, window: int = 0, plan: Plan | None = None
) -> Tensor:
    """Through the public function; with a plan, around its choice of one."""
    tensors = (case.q, case.k_cache, case.v_cache, case.block_table, case.row_start, case.first_position)
    there = tuple(tensor.to(DEVICE) for tensor in tensors)
    if plan:
        return gpu.paged_attention(*there, case.heads, scale, softcap, window, None, plan).cpu()
    return paged_attention(
        *there, heads=case.heads, scale=scale, softcap=softcap, window=window, layout="nhd", impl="triton"
    ).cpu()


def accurate(
    case: PagedCase, out: Tensor, rows: slice | Tensor = slice(None), *, scale: float = 0.3, softcap: float | None = None,
    window: int = 0,
) -> None:  # fmt: skip
    """At most twice as far from the truth as float32 with what the type must round, and some units in the last place.

    ``out`` [rows of the case] holds what is expected in ``rows`` of it.
    """
    dtype, settings = case.q.dtype, {"scale": scale, "softcap": softcap, "window": window}
    rounded = None if dtype is torch.float32 else dtype
    exact = case.exact(torch.float64, **settings)
    plain = case.exact(torch.float32, **settings, rounded=rounded)
    assert out.dtype is dtype
    magnitude = case.exact(torch.float64, **settings, absolute=True)
    assert_accurate(out[rows], exact[rows], plain[rows], magnitude[rows])


def divided(case: PagedCase, splits: int, lines: int | None = None) -> Plan:
    """Keys in a given number of parts, and perhaps other tiles than shapes would give."""
    group = case.heads // case.k_cache.shape[2]
    tile = tiles(chip_of(DEVICE).capability, case.q.dtype, case.k_cache.shape[3], max(group, lines or 1))
    rows = tile.lines // group
    return Plan(tile, rows, case.q.shape[0] // rows + len(case.k), splits)


@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim"),
    [(2, 1, 8), (1, 3, 24), (1, 2, 80), (2, 4, 64), (1, 7, 64), (2, 1, 96), (1, 4, 128), (1, 2, 256), (1, 32, 160)],
)
@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float16], ids=str)
def test_heads(kv_heads: int, group: int, head_dim: int, dtype: torch.dtype) -> None:
    """Stale NaN in unwritten positions and in pages of nobody does not reach the result."""
    case = case_of(FEW_SPANS, kv_heads, group, head_dim, dtype)
    accurate(case, attend(case))


@pytest.mark.parametrize(("splits", "dtype"), [(1, HALF), (3, torch.float32)])
@pytest.mark.parametrize("window", [0, 1, 33, 64, 1000])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_windows_and_soft_cap(softcap: float | None, window: int, splits: int, dtype: torch.dtype) -> None:
    """More parts than some sequences have keys for, tiles with and without keys that every line sees."""
    case = case_of(SPANS, 1, 2, 24, dtype)
    out = attend(case, softcap=softcap, window=window, plan=divided(case, splits, lines=64))
    accurate(case, out, softcap=softcap, window=window)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 129])
def test_lengths_around_the_edges_of_pages_and_tiles(length: int) -> None:
    """As one last row, as a prompt and as a draft behind one."""
    case = case_of(((length - 1, 1), (0, length), (length, 7)), 1, 3, 16, HALF)
    accurate(case, attend(case))


def test_a_long_prompt() -> None:
    case = case_of(((0, 300), (17, 150)), 1, 2, 16, HALF)
    for window in (0, 70):
        accurate(case, attend(case, window=window), window=window)


def test_many_sequences() -> None:
    """More than are counted at a time, many of them without rows."""
    case = case_of(tuple((7 * i % 67, 1 if i % 13 == 0 else 0) for i in range(150)), 1, 2, 16, HALF)
    accurate(case, attend(case))


@pytest.mark.parametrize(("group", "head_dim"), [(16, 16), (40, 8), (64, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_groups_as_large_as_a_tile(group: int, head_dim: int, dtype: torch.dtype) -> None:
    case = case_of(((33, 1), (0, 3)), 1, group, head_dim, dtype)
    accurate(case, attend(case))


@pytest.mark.parametrize(("splits", "window"), [(2, 0), (5, 130), (13, 0)])
def test_keys_in_parts(splits: int, window: int) -> None:
    case = case_of(((0, 2), (400, 1), (333, 0), (190, 9)), 1, 2, 64, HALF)
    accurate(case, attend(case, window=window, plan=divided(case, splits)), window=window)


def test_parts_follow_from_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows before many keys are divided among programs, by ``longest`` if it is given; right whatever it is."""
    case, used = case_of(((700, 1), (690, 1)), 1, 2, 16, HALF), []

    def plan(*arguments: object) -> Plan:
        used.append(before(*arguments).splits)
        return before(*arguments)

    before = gpu.plan
    monkeypatch.setattr(gpu, "plan", plan)
    accurate(case, attend(case))
    tensors = (case.q, case.k_cache, case.v_cache, case.block_table, case.row_start, case.first_position)
    for longest in (1, 10**9):
        out = paged_attention(
            *(tensor.to(DEVICE) for tensor in tensors), heads=2, scale=0.3, longest=longest, layout="nhd", impl="triton"
        )
        accurate(case, out.cpu())
    assert used[0] == used[2] > used[1] == 1


@pytest.mark.parametrize("scale", [4.0, 30.0])
@pytest.mark.parametrize("splits", [1, 2])
def test_scores_far_apart(scale: float, splits: int) -> None:
    """One key takes nearly all of the weight, and the maximum rises over the tiles."""
    case = case_of(FEW_SPANS, 1, 2, 16, torch.float32)
    accurate(case, attend(case, scale=scale, plan=divided(case, splits)), scale=scale)


@pytest.mark.parametrize("softcap", [1e-3, 50.0])
def test_soft_caps_at_both_ends(softcap: float) -> None:
    """Scores far below the cap, where tanh must not lose them, and far above."""
    case = case_of(FEW_SPANS, 1, 2, 16, torch.float32)
    accurate(case, attend(case, softcap=softcap), softcap=softcap)


def test_a_soft_cap_of_zero_is_none() -> None:
    """As configs of models write it, by the public function, by its reference and by the launcher on its own."""
    case = case_of(FEW_SPANS, 1, 2, 16, HALF)
    tensors = (case.q, case.k_cache, case.v_cache, case.block_table, case.row_start, case.first_position)
    plan = divided(case, 1)
    for found, expected in (
        (attend(case, softcap=0.0), attend(case)),
        (attend(case, softcap=0.0, plan=plan), attend(case, plan=plan)),
    ):
        assert torch.equal(found, expected)
    options = {"heads": case.heads, "scale": 0.3, "layout": "nhd", "impl": "torch"}
    assert torch.equal(paged_attention(*tensors, softcap=0.0, **options), paged_attention(*tensors, **options))


@pytest.mark.parametrize("splits", [1, 2])
def test_queries_inside_a_fused_qkv_and_rows_of_nobody(splits: int) -> None:
    """Neither the columns behind the queries nor the rows behind the last sequence have influence."""
    case = case_of(FEW_SPANS, 2, 3, 24, HALF, extra_columns=2 * 2 * 24)
    behind = torch.full((37, case.q.shape[1]), float("nan"), dtype=HALF)
    more = replace(case, q=torch.cat((case.q, behind)))
    out = attend(more, plan=divided(more, splits))
    assert out.shape == (len(case.q) + 37, 6 * 24)
    accurate(case, out[: len(case.q)])


@pytest.mark.parametrize("spans", [((5, 0), (0, 0)), ((5, 0),)])
def test_no_rows(spans: Spans) -> None:
    case = case_of(spans, 1, 2, 16, HALF)
    assert attend(case).shape == (0, 32)
    padded = replace(case, q=randn(0, 20, 32, dtype=HALF))
    assert attend(padded, plan=divided(padded, 2)).shape == (20, 32)


def test_no_sequences() -> None:
    case = case_of(((3, 1),), 1, 2, 16, HALF)
    none = replace(
        case, block_table=case.block_table[:0], row_start=case.row_start[:1], first_position=case.first_position[:0]
    )
    assert attend(none).shape == (1, 32)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize(("splits", "dtype"), [(1, HALF), (2, torch.float32)])
def test_what_is_not_finite_reaches_the_rows_that_see_it(splits: int, broken: float, dtype: torch.dtype) -> None:
    """A weight of 0 for a position behind a row, or outside its window, keeps NaN out; no row hides what it sees."""
    case = case_of(((60, 20),), 1, 2, 24, dtype)
    sound = attend(case, window=40, plan=divided(case, splits, lines=64))
    for at, seen in ((70, range(10, 20)), (25, range(5))):
        for cache in (case.k_cache, case.v_cache):
            values = cache.clone()
            values[case.block_table[0, at // PAGE_SIZE], at % PAGE_SIZE, 0, 5] = broken
            ill = replace(case, **{"k_cache" if cache is case.k_cache else "v_cache": values})
            out = attend(ill, window=40, plan=divided(case, splits, lines=64))
            healthy = torch.ones(20, dtype=torch.bool)
            healthy[list(seen)] = False
            accurate(case, out, healthy, window=40)
            if not (broken > 0 and cache is case.k_cache):  # a score of -inf is a weight of 0
                assert not out[~healthy].isfinite().all(1).any()
    q = case.q.clone()
    q[7, 3] = float("nan")
    out = attend(replace(case, q=q), window=40, plan=divided(case, splits, lines=64))
    assert out[7, :24].isnan().all()
    out[7, :24] = sound[7, :24]
    accurate(case, out, window=40)


@functools.cache
def all_rows(splits: int, window: int) -> Tensor:
    case = case_of(SPANS, 1, 2, 24, HALF)
    return attend(case, window=window, plan=divided(case, splits, lines=64))


@st.composite
def parts(draw: st.DrawFn) -> tuple[int, int, int]:
    """A sequence of SPANS and the first and last + 1 of some of its rows."""
    sequence = draw(st.sampled_from([s for s, (_, rows) in enumerate(SPANS) if rows]))
    rows = SPANS[sequence][1]
    first = draw(st.integers(0, rows - 1))
    return sequence, first, draw(st.integers(first + 1, rows))


@settings(max_examples=8)
@given(
    chosen=st.lists(parts(), min_size=1, max_size=3, unique_by=lambda part: part[0]), window=st.sampled_from([0, 33])
)
def test_rows_keep_their_bits_in_any_window_of_any_batch(chosen: list[tuple[int, int, int]], window: int) -> None:
    """Where keys are not divided: alone, in a part of its window, beside other sequences."""
    case = case_of(SPANS, 1, 2, 24, HALF)
    some, rows = part_of(case, chosen)
    assert torch.equal(attend(some, window=window, plan=divided(some, 1, lines=64)), all_rows(1, window)[rows])


def test_rows_keep_their_bits_beside_any_sequences() -> None:
    """Where keys are divided."""
    case = case_of(SPANS, 1, 2, 24, HALF)
    for chosen in ([5, 3], [2]):
        some, rows = part_of(case, [(s, 0, SPANS[s][1]) for s in chosen])
        assert torch.equal(attend(some, plan=divided(some, 2, lines=64)), all_rows(2, 0)[rows])


def part_of(case: PagedCase, chosen: list[tuple[int, int, int]]) -> tuple[PagedCase, list[int]]:
    """Some rows (first, last + 1) of some sequences as a batch of their own, and which of the rows of all they are."""
    bounds, rows, counts = case.row_start.tolist(), [], [0]
    for s, begin, end in chosen:
        rows += range(bounds[s] + begin, bounds[s] + end)
        counts.append(end - begin)
    sequences = [s for s, _, _ in chosen]
    first = [int(case.first_position[s]) + begin for s, begin, _ in chosen]
    some = replace(
        case, q=case.q[rows], k=[case.k[s] for s in sequences], block_table=case.block_table[sequences],
        row_start=torch.tensor(counts).cumsum(0).int(), first_position=torch.tensor(first, dtype=torch.int32),
    )  # fmt: skip
    return some, rows


def test_tiles_of_every_size() -> None:
    """Whatever a chip's table holds is right, not only what this one's does."""
    case = case_of(((60, 20), (3, 1)), 1, 3, 24, HALF)
    for lines, keys in ((16, 32), (16, 128), (32, 64), (128, 32)):
        rows = lines // 3
        plan = Plan(Tiles(lines, keys, 4, 2, 1), rows, 21 // rows + 2, 1)
        accurate(case, attend(case, plan=plan, softcap=5.0, window=50), softcap=5.0, window=50)


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
def test_a_captured_launch_serves_other_sequences() -> None:
    """Of the same shapes: lengths, rows and pages are read on the device."""
    before, after = (case_of(spans, 2, 2, 64, HALF) for spans in (((300, 8), (5, 24)), ((40, 30), (310, 1))))
    shape = (32, before.q.shape[1])
    q, table = torch.zeros(shape, dtype=HALF, device=DEVICE), torch.zeros(2, 12, dtype=torch.int32, device=DEVICE)
    k, v = (torch.zeros(40, 32, 2, 64, dtype=HALF, device=DEVICE) for _ in range(2))
    starts = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    first = torch.zeros(2, dtype=torch.int32, device=DEVICE)

    def fill(case: PagedCase) -> None:
        for to, source in (
            (q, case.q), (k, case.k_cache), (v, case.v_cache), (starts, case.row_start), (first, case.first_position),
        ):  # fmt: skip
            to[: len(source)].copy_(source)
        table[:, : case.block_table.shape[1]].copy_(case.block_table)

    def run() -> Tensor:
        return paged_attention(q, k, v, table, starts, first, heads=4, scale=0.3, layout="nhd", impl="triton")

    fill(before)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for case in (before, after):
        fill(case)
        graph.replay()
        accurate(case, out[: len(case.q)].cpu())


def zeros(*shape: int) -> Tensor:
    """Of HALF; on a CPU they take memory only where they are touched."""
    if DEVICE.type == "cpu":
        return torch.from_numpy(np.zeros(shape, np.int16)).view(HALF)
    return torch.zeros(shape, dtype=HALF, device=DEVICE)


def test_pages_above_two_to_the_31() -> None:
    """Elements of either cache."""
    case = case_of(((90, 4),), 8, 1, 128, HALF)
    pages = (1 << 31) // (PAGE_SIZE * 8 * 128) + 50
    caches = {name: zeros(pages, PAGE_SIZE, 8, 128) for name in ("k_cache", "v_cache")}
    table = case.block_table.clone()
    owned = table[0, :3].tolist()
    table[0, :3] = torch.tensor([pages - 1, pages - 40, pages - 7])
    for name, cache in caches.items():
        cache[table[0, :3].tolist()] = getattr(case, name)[owned].to(DEVICE)
    accurate(case, attend(replace(case, **caches, block_table=table)))


def test_queries_above_two_to_the_31() -> None:
    """Elements from the first row to the last, which lie far apart in what they are a part of."""
    case = case_of(((90, 3),), 1, 2, 16, HALF)
    apart = 1 << 30
    q = zeros(2 * apart + 32).as_strided((3, 32), (apart, 1))
    q.copy_(case.q)
    accurate(case, attend(replace(case, q=q)))
