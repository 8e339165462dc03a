"""Engines whose attention is flash-attn's: pages in runs, and the same answers."""

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from engine import RefineOptions, Refiner
from engine.kernels.flash_attention import PAGES_PER_RUN
from engine.kv_cache import KVCache
from engine.model import Decoder
from tests.engine.checkpoints import Oracle, prompts
from tests.kernels.flash_stand_in import varlen

LIMIT = 20


@pytest.mark.parametrize("loop", ["host", "device"])
@pytest.mark.parametrize("name", ["qwen3-tied", "mistral-window", "gemma2"])
def test_equals_greedy_generate(
    name: str, loop: str, oracle: Callable[[str], Oracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the library, and a pool that holds two sequences at a time."""
    calls: list[int] = []

    def counted(q: torch.Tensor, *given: object, **named: object) -> torch.Tensor:
        calls.append(len(q))
        return varlen(q, *given, **named)  # type: ignore[arg-type]

    def new_cache(self: Decoder, pages: int) -> KVCache:
        spec, dtype = self.spec, torch.float32
        return KVCache(spec.layers, pages, spec.kv_heads, spec.head_dim, dtype, self.device, "nhd", flash_rows=0)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=counted))
    monkeypatch.setattr(sys.modules["engine.kernels.paged_attention"], "reason_against_flash", lambda q: None)
    monkeypatch.setattr(Decoder, "new_cache", new_cache)
    monkeypatch.setenv("DIFFPO_LOOP", loop)
    model, texts = oracle(name), prompts(1)
    requests = [
        {"prompt_ids": p, "draft_ids": model.greedy(p, LIMIT)[::-1] if i % 2 else []} for i, p in enumerate(texts)
    ]
    with Refiner.from_pretrained(model.folder, backend="lean", kv_cache_tokens=2 * 256 - 40) as refiner:
        assert refiner._alive().cache.pool.size == 2 * PAGES_PER_RUN
        results = refiner.refine(requests, RefineOptions(max_new_tokens=LIMIT))
        refiner.check_integrity()
    assert [r.token_ids for r in results] == [model.greedy(p, LIMIT) for p in texts]
    assert len(calls) > LIMIT
