"""Paged storage of keys and values, and the pool that hands out its pages."""

import math

import numpy as np
import torch
from torch import Tensor

from engine.errors import OutOfMemory
from engine.kernels import PAGE_SIZE, KVLayout, kv_cache_shapes
from engine.kernels.flash_attention import PAGES_PER_RUN
from engine.kernels.triton_choice import forced_on_cpus


class PagePool:
    """Hands out page numbers 0 .. size - 1; every page is free or has exactly one owner.

    ``run`` divides ``size``: pages come in whole runs of as many, each starting at a multiple of it.
    """

    def __init__(self, size: int, run: int = 1) -> None:
        assert size % run == 0
        self.size = size
        self.run = run
        self._free = list(range(size // run - 1, -1, -1))  # runs

    @property
    def free_count(self) -> int:
        return len(self._free) * self.run

    def rounded(self, count: int) -> int:
        """Pages handed out for ``count`` that are asked for."""
        return -(-count // self.run) * self.run

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages, rounded up to whole runs; None where fewer are free."""
        runs = self.rounded(count) // self.run
        if runs > len(self._free):
            return None
        taken = self._free[len(self._free) - runs :]
        del self._free[len(self._free) - runs :]
        return self._pages(taken)

    def release(self, pages: list[int]) -> None:
        self._free.extend(page // self.run for page in pages[:: self.run])

    def check_integrity(self, owned: list[list[int]]) -> None:
        """Raises AssertionError unless free and owned pages are together every page exactly once."""
        pages = self._pages(self._free) + [page for owner in owned for page in owner]
        if sorted(pages) != list(range(self.size)):
            lost = sorted(set(range(self.size)) - set(pages))
            shared = sorted({page for page in pages if pages.count(page) > 1})
            raise AssertionError(f"page pool of {self.size}: lost {lost}, shared {shared}, held {len(pages)}")

    def _pages(self, runs: list[int]) -> list[int]:
        return [run * self.run + page for run in runs for page in range(self.run)]


def pages_for(positions: int) -> int:
    """Pages that hold this many positions."""
    return -(-positions // PAGE_SIZE)


class KVCache:
    """K and V of every layer: ``k[layer]`` and ``v[layer]`` as engine.kernels.kv_cache_shapes describes for ``layout``."""

    def __init__(
        self,
        layers: int,
        pages: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        layout: KVLayout | None = None,
        flash_rows: int | None = None,
    ) -> None:
        """``layout``: by default what the device's own kernels read. ``flash_rows``: rows per sequence from which attention is
        flash-attn's, whose pages come in runs; None: never."""
        run = 1 if flash_rows is None else PAGES_PER_RUN
        pages = -(-pages // run) * run
        self.flash_rows = flash_rows
        self.pool = PagePool(pages, run)
        self.layout: KVLayout = layout or ("panels" if device.type == "cpu" and not forced_on_cpus() else "nhd")
        k_shape, v_shape = kv_cache_shapes(pages, kv_heads, head_dim, self.layout)
        self.k = _zeros((layers, *k_shape), dtype, device).unbind(0)
        self.v = _zeros((layers, *v_shape), dtype, device).unbind(0)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros are mapped on first touch: a pool takes memory as it is used, not as it is sized
    try:
        storage = np.zeros(shape, dtype=np.int32 if dtype.itemsize == 4 else np.int16)
    except MemoryError as error:
        size = math.prod(shape) * dtype.itemsize / 1e9
        raise OutOfMemory(f"the KV pool needs twice {size:.1f} GB and cannot have it: lower kv_cache_tokens") from error
    return torch.from_numpy(storage).view(dtype)
