"""Pages and their owners."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import OutOfMemory
from engine.kernels import PAGE_SIZE, kv_cache_shapes
from engine.kv_cache import KVCache, PagePool, pages_for


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 30), st.sampled_from([1, 4]), st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=40))
def test_every_page_has_one_place(size: int, run: int, actions: list[tuple[bool, int]]) -> None:
    """And with runs, the run that it came in."""
    size -= size % run
    pool = PagePool(size, run)
    owned: list[list[int]] = []
    for take, number in actions:
        if take:
            free = pool.free_count
            pages = pool.allocate(number)
            assert (pages is None) == (number > free)
            if pages is not None:
                assert len(pages) == pool.rounded(number)
                assert number <= len(pages) < number + run
                starts = range(0, len(pages), run)
                assert all(pages[i : i + run] == list(range(pages[i], pages[i] + run)) for i in starts)
                assert all(pages[i] % run == 0 for i in starts)
                owned.append(pages)
        elif owned:
            pool.release(owned.pop(number % len(owned)))
        pool.check_integrity(owned)
        assert pool.free_count == size - sum(map(len, owned))


def test_integrity_errors_name_the_pages() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    assert pages is not None
    with pytest.raises(AssertionError, match=rf"lost \[{pages[0]}\]"):
        pool.check_integrity([pages[1:]])
    pool.release(pages)
    with pytest.raises(AssertionError, match=rf"shared \[{pages[0]}\]"):
        pool.check_integrity([pages[:1]])


@pytest.mark.parametrize(("positions", "pages"), [(1, 1), (PAGE_SIZE, 1), (PAGE_SIZE + 1, 2), (10 * PAGE_SIZE, 10)])
def test_pages_for(positions: int, pages: int) -> None:
    assert pages_for(positions) == pages


def test_a_cache_for_flash_attention_has_whole_runs_of_pages() -> None:
    cache = KVCache(1, 5, 2, 8, torch.float32, torch.device("cpu"), "nhd", flash_rows=0)
    assert (cache.pool.size, cache.pool.run, len(cache.k[0])) == (8, 8, 8)
    assert KVCache(1, 5, 2, 8, torch.float32, torch.device("cpu")).pool.run == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_storage_starts_as_zeros_of_the_kernels_shapes(dtype: torch.dtype) -> None:
    cache = KVCache(3, 5, 2, 12, dtype, torch.device("cpu"))
    shapes = kv_cache_shapes(5, 2, 12)
    assert len(cache.k) == len(cache.v) == 3
    for tensors, shape in zip((cache.k, cache.v), shapes, strict=True):
        for tensor in tensors:
            assert tensor.shape == shape
            assert tensor.dtype == dtype
            assert tensor.is_contiguous()
            assert not tensor.any()


def test_a_pool_beyond_memory_says_what_to_lower() -> None:
    with pytest.raises(OutOfMemory, match="kv_cache_tokens"):
        KVCache(10**9, 1000, 8, 256, torch.float32, torch.device("cpu"))
