import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import paged_attention
from engine.kernels.gpu.attention_plan import MAX_SPLITS, Chip, plan
from tests.kernels.references import paged_case

HALF = torch.bfloat16
CHIPS = [Chip(80, 108), Chip(86, 84), Chip(90, 132), Chip(100, 148), Chip(103, 148), Chip(120, 170)]


@given(
    chip=st.sampled_from(CHIPS), dtype=st.sampled_from([torch.float32, HALF]), head_dim=st.integers(1, 256),
    group=st.integers(1, 64), kv_heads=st.integers(1, 32), counts=st.lists(st.integers(0, 300), min_size=1, max_size=40),
    padding=st.integers(0, 300), window=st.sampled_from([0, 1, 4096]), longest=st.integers(1, 1 << 20),
)  # fmt: skip
def test_every_row_has_a_tile(
    chip: Chip, dtype: torch.dtype, head_dim: int, group: int, kv_heads: int, counts: list[int], padding: int,
    window: int, longest: int,
) -> None:  # fmt: skip
    """However the rows are divided into sequences, the programs of the plan, as the kernel reads them, are enough."""
    if dtype is torch.float32 and head_dim > 128:
        group = min(group, 32)  # more are refused
    t, starts = sum(counts) + padding, [sum(counts[:s]) for s in range(len(counts) + 1)]
    if t == 0:
        return
    found = plan(chip, dtype, head_dim, group, kv_heads, t, len(counts), window, longest)
    assert found.rows >= 1
    assert found.rows * group <= found.tiles.lines
    assert 1 <= found.splits <= MAX_SPLITS
    covered = []
    for tile in range(found.row_tiles):
        s = sum(starts[s + 1] // found.rows + s < tile for s in range(len(counts)))
        if s < len(counts):
            first = (tile - starts[s] // found.rows - s) * found.rows
            covered += range(starts[s] + first, min(starts[s] + first + found.rows, starts[s + 1]))
    assert covered == list(range(starts[-1]))


def test_keys_are_divided_where_tiles_are_few() -> None:
    """One row behind a long prefix fills an H100; a long prompt does so undivided; short prefixes are not cut to pieces."""
    chip = Chip(90, 132)
    llama = (HALF, 128, 4, 8)
    assert 132 <= 8 * plan(chip, *llama, 1, 1, 0, 8192).splits <= 3 * 132
    assert plan(chip, *llama, 4096, 1, 0, 4096).splits == 1
    assert plan(chip, *llama, 1, 1, 0, 100).splits == 1
    assert plan(chip, *llama, 1, 1, 128, 8192).splits == 1, "a window of two tiles"


def arguments() -> list[Tensor]:
    case = paged_case(((3, 2), (40, 1)), 1, 2, 24, layout="nhd")
    return [case.q, case.k_cache, case.v_cache, case.block_table, case.row_start, case.first_position]


def test_inputs_that_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # refused before anything would run
    wrong = [
        (0, lambda q: q.bfloat16()),
        (0, lambda q: q[:, :40]),
        (0, lambda q: q.repeat(1, 2).as_strided((3, 48), (96, 2))),
        (0, lambda q: q.requires_grad_()),
        (1, lambda k: k[:, :16]),
        (2, lambda v: v.permute(0, 2, 1, 3)),
        (3, lambda table: table.long()),
        (4, lambda starts: starts[:2]),
        (5, lambda first: first.repeat(2)),
    ]
    for i, change in wrong:
        given_tensors = arguments()
        given_tensors[i] = change(given_tensors[i].clone())
        with pytest.raises(ValueError, match='cannot run here: it needs caches of layout "nhd"'):
            paged_attention(*given_tensors, heads=2, scale=0.3, layout="nhd", impl="triton")
    for settings in ({"layout": "panels"}, {"scale": -1.0}, {"heads": 65}):
        with pytest.raises(ValueError, match='cannot run here: it needs caches of layout "nhd"'):
            paged_attention(*arguments(), **{"heads": 2, "scale": 0.3, "layout": "nhd", "impl": "triton"} | settings)


def test_more_query_heads_than_float32_has_registers_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = paged_case(((3, 2),), 1, 33, 160, layout="nhd")
    tensors = (case.q, case.k_cache, case.v_cache, case.block_table, case.row_start, case.first_position)
    with pytest.raises(ValueError, match="32 in float32 with more than 128 columns"):
        paged_attention(*tensors, heads=33, scale=0.3, layout="nhd", impl="triton")
    assert paged_attention(*tensors, heads=33, scale=0.3, layout="nhd").shape == (2, 33 * 160)


def test_without_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="it needs tensors on a GPU"):
        paged_attention(*arguments(), heads=2, scale=0.3, layout="nhd", impl="triton")
