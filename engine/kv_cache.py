"""Paged storage of keys and values, and the pool that hands out its pages."""

import math

import numpy as np
import torch
from torch import Tensor

from engine.errors import OutOfMemory
from engine.kernels import PAGE_SIZE, KVLayout, kv_cache_shapes


class PagePool:
    """Hands out page numbers 0 .. size - 1; every page is free or has exactly one owner."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))

    @property
    def free_count(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages, or None where fewer are free."""
        if count > len(self._free):
            return None
        pages = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return pages

    def release(self, pages: list[int]) -> None:
        self._free.extend(pages)

    def check_integrity(self, owned: list[list[int]]) -> None:
        """Raises AssertionError unless free and owned pages are together every page exactly once."""
        pages = self._free + [page for owner in owned for page in owner]
        if sorted(pages) != list(range(self.size)):
            lost = sorted(set(range(self.size)) - set(pages))
            shared = sorted({page for page in pages if pages.count(page) > 1})
            raise AssertionError(f"page pool of {self.size}: lost {lost}, shared {shared}, held {len(pages)}")


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
    ) -> None:
        """``layout``: by default what the device's own kernels read."""
        self.pool = PagePool(pages)
        self.layout: KVLayout = layout or ("panels" if device.type == "cpu" else "nhd")
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
