"""Paged attention through flash-attn: the library itself where it is installed beside a GPU, elsewhere a stand-in."""

import importlib.util
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import PAGE_SIZE, flash_attention, paged_attention
from engine.kernels.flash_attention import PAGES_PER_RUN, flash_indices, rows_for_flash
from tests.kernels.flash_stand_in import varlen
from tests.kernels.references import PagedCase, assert_accurate, paged_case

HALF = torch.bfloat16
SPANS = ((0, 1), (95, 3), (0, 300), (255, 2), (512, 70), (700, 13))  # (first position, rows)
THERE = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None


@pytest.fixture(params=["stand-in", pytest.param("flash-attn", marks=pytest.mark.skipif(not THERE, reason="not here"))])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the library is that is called."""
    if request.param == "flash-attn":
        return torch.device("cuda")
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen))
    monkeypatch.setattr(sys.modules["engine.kernels.paged_attention"], "reason_against_flash", lambda q: None)
    return torch.device("cpu")


def in_runs(case: PagedCase) -> PagedCase:
    """The same sequences in pages of runs, which lie in any order; other positions hold 7."""
    lengths = [len(k) for k in case.k]
    runs = [-(-length // (PAGE_SIZE * PAGES_PER_RUN)) for length in lengths]
    order = torch.randperm(sum(runs), generator=torch.Generator().manual_seed(1)).tolist()
    table = torch.zeros(len(lengths), max(runs) * PAGES_PER_RUN, dtype=torch.int32)
    shape = (len(order), PAGES_PER_RUN * PAGE_SIZE, *case.k[0].shape[1:])
    caches = [torch.full(shape, 7.0, dtype=case.q.dtype) for _ in range(2)]
    for s, length in enumerate(lengths):
        mine = [order.pop() for _ in range(runs[s])]
        pages = torch.tensor(mine, dtype=torch.int32)[:, None] * PAGES_PER_RUN + torch.arange(PAGES_PER_RUN)
        table[s, : pages.numel()] = pages.flatten()
        for cache, values in zip(caches, (case.k[s], case.v[s]), strict=True):
            for i, run in enumerate(mine):
                part = values[i * shape[1] : min((i + 1) * shape[1], length)]
                cache[run, : len(part)] = part
    k_cache, v_cache = (cache.view(-1, PAGE_SIZE, *shape[2:]) for cache in caches)
    return replace(case, k_cache=k_cache, v_cache=v_cache, block_table=table)


def attend(
    case: PagedCase, device: torch.device, impl: Any = "flash", padding: int = 0, least_rows: int = 0, **how: Any
) -> Tensor:
    q = torch.cat((case.q, torch.full_like(case.q[:1], float("nan")).expand(padding, -1)))
    tensors = (q, case.k_cache, case.v_cache, case.block_table, case.row_start, case.first_position)
    q, k, v, *sequences = (tensor.to(device) for tensor in tensors)
    flash = flash_indices(*sequences, least_rows)
    options = {"heads": case.heads, "scale": 0.3, "layout": "nhd"} | how
    return paged_attention(q, k, v, *sequences, flash=flash, impl=impl, **options).cpu()[: len(case.q)]


@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 1, 64), (1, 3, 96), (2, 4, 128), (1, 2, 256)])
@pytest.mark.parametrize(("softcap", "window"), [(None, 0), (2.0, 0), (None, 33), (2.0, 1)])
@pytest.mark.parametrize("dtype", [HALF, torch.float16], ids=str)
def test_equals_exact_attention(
    kv_heads: int,
    group: int,
    head_dim: int,
    softcap: float | None,
    window: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Queries as columns of a wider qkv, and with rows of no sequence behind them."""
    case = in_runs(paged_case(SPANS, kv_heads, group, head_dim, 16, layout="nhd").of_type(dtype))
    how: dict[str, Any] = {"scale": 0.3, "softcap": softcap, "window": window}
    out = attend(case, device, padding=5, **how)
    exact, plain = case.exact(torch.float64, **how), case.exact(torch.float32, **how, rounded=dtype)
    assert_accurate(out, exact, plain, case.exact(torch.float64, **how, absolute=True))


def test_by_default_only_from_so_many_rows_on(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = in_runs(paged_case(((40, 8), (300, 12)), 1, 2, 64, layout="nhd").of_type(HALF))
    module = sys.modules["engine.kernels.paged_attention"]
    called: list[bool] = []

    def noted(*given: Any) -> Tensor:
        called.append(True)
        return flash_attention.flash_attention(*given)

    monkeypatch.setattr(module, "flash_attention", noted)
    for least_rows, expected in ((0, True), (10, True), (11, False)):  # 20 rows of two sequences
        called.clear()
        out = attend(case, device, "auto", least_rows=least_rows)
        assert bool(called) == expected
        torch.testing.assert_close(out, attend(case, torch.device("cpu"), "torch"), rtol=2e-2, atol=2e-2)


def test_what_it_cannot_do(device: torch.device) -> None:
    case = in_runs(paged_case(SPANS, 1, 2, 12, layout="nhd").of_type(HALF))
    with pytest.raises(ValueError, match="multiple of 8 columns"):
        attend(case, device)
    attend(case, device, "auto")  # by another implementation
    tensors = (case.q, case.k_cache, case.v_cache, case.block_table, case.row_start, case.first_position)
    with pytest.raises(ValueError, match="needs flash_indices"):
        paged_attention(*(t.to(device) for t in tensors), heads=2, scale=0.3, layout="nhd", impl="flash")


def test_reasons_without_a_gpu() -> None:
    case = in_runs(paged_case(SPANS, 1, 2, 64, layout="nhd").of_type(HALF))
    with pytest.raises(ValueError, match="needs tensors on a GPU, got cpu"):
        attend(case, torch.device("cpu"))


def test_which_engines_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table decides where nobody does; an empty one never takes it."""
    chip = torch.device("cuda")
    monkeypatch.delenv("DIFFPO_ATTENTION", raising=False)
    monkeypatch.setattr(flash_attention, "FASTER_FROM", {(90, 128): 64})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: dtype)
    monkeypatch.setattr(flash_attention, "reason_against_flash", lambda q: None if q is HALF else "float32")
    assert rows_for_flash(chip, HALF, 128) == 64
    assert rows_for_flash(chip, HALF, 64) is rows_for_flash(chip, torch.float32, 128) is None
    monkeypatch.setenv("DIFFPO_ATTENTION", "triton")
    assert rows_for_flash(chip, HALF, 128) is None
    monkeypatch.setenv("DIFFPO_ATTENTION", "flash")
    assert rows_for_flash(chip, HALF, 64) == 0
    for head_dim, dtype in ((12, HALF), (64, torch.float32)):
        with pytest.raises(ValueError, match="DIFFPO_ATTENTION=flash cannot be used here"):
            rows_for_flash(chip, dtype, head_dim)
    monkeypatch.setenv("DIFFPO_ATTENTION", "fast")
    with pytest.raises(ValueError, match='"auto", "flash" or "triton"'):
        rows_for_flash(chip, HALF, 64)
