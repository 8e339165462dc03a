"""Paged attention on the shapes of a refinement: windows behind prefixes, one and many sequences, a long prompt."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.gpu.case import Case, difference, rounding
from engine.kernels import PAGE_SIZE, paged_attention
from engine.kernels.flash_attention import PAGES_PER_RUN, flash_indices
from engine.kernels.native import Impl
from engine.kernels.triton_choice import reason_against_triton


@dataclass(frozen=True, slots=True)
class Work:
    """``rows`` per sequence behind ``prefix`` positions each."""

    model: str
    heads: int
    kv_heads: int
    head_dim: int
    softcap: float | None
    window: int
    sequences: int
    rows: int
    prefix: int

    @property
    def name(self) -> str:
        window = f", window {self.window}" if self.window else ""
        return f"{self.model}: {self.sequences} x {self.rows} rows behind {self.prefix}{window}"

    @property
    def seen(self) -> int:
        """Pairs of a row and a key that it sees, of one sequence."""
        keys = range(self.prefix + 1, self.prefix + self.rows + 1)
        return sum(min(n, self.window) if self.window else n for n in keys)

    @property
    def keys(self) -> int:
        """Of one sequence, that some row sees."""
        length = self.prefix + self.rows
        return min(length, self.window + self.rows - 1) if self.window else length


WORK = [
    Work("gemma-2-9b", 16, 8, 256, 50.0, 0, 1, 256, 512),
    Work("llama-3-8b", 32, 8, 128, None, 0, 1, 256, 512),
    Work("llama-3-8b", 32, 8, 128, None, 0, 1, 16, 8192),
    Work("llama-3-8b", 32, 8, 128, None, 0, 8, 32, 1024),
    Work("llama-3-8b", 32, 8, 128, None, 0, 32, 1, 2048),
    Work("llama-3-8b", 32, 8, 128, None, 0, 1, 4096, 0),
    Work("gemma-2-9b", 16, 8, 256, 50.0, 0, 8, 32, 1024),
    Work("gemma-2-9b", 16, 8, 256, 50.0, 4096, 32, 1, 8192),
    Work("qwen-2.5-0.5b", 14, 2, 64, None, 0, 8, 32, 1024),
]
TINY = [Work("tiny", 4, 2, 16, 5.0, 24, 2, 3, 40), Work("tiny", 4, 2, 16, None, 0, 2, 3, 40)]


def cases(device: torch.device, *, tiny: bool) -> Iterator[Case]:
    for work in TINY if tiny else WORK:
        yield case(work, device)


def case(work: Work, device: torch.device) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    q, k, v, table, starts, first = inputs(work, device, dtype)
    impl: Impl = "auto" if reason_against_triton(q) else "triton"

    def ours() -> Tensor:
        return paged_attention(
            q, k, v, table, starts, first, heads=work.heads, scale=work.head_dim**-0.5, softcap=work.softcap,
            window=work.window, layout="nhd", impl=impl,
        )  # fmt: skip

    variants: dict[str, Callable[[], object]] = {"ours": ours}
    variants["eager"] = functools.partial(dense, work, q, *unpaged(work, k, v, table))
    if device.type == "cuda":
        variants["torch.compile"] = functools.partial(torch.compile(dense), work, q, *unpaged(work, k, v, table))
    if not work.softcap and not work.window:
        variants["sdpa"] = functools.partial(sdpa, work, q, *unpaged(work, k, v, table))
    if work.softcap:
        variants["flex attention"] = flex(work, q, *unpaged(work, k, v, table))
    if device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        variants["flash-attn 2"] = flash_attention_2(work, q, k, v, table, starts, first)
    if importlib.util.find_spec("flash_attn_interface") is not None:
        variants["flash-attn 3"] = functools.partial(flash_attention_3, work, q, k, v, table, starts, first)
    size, span = dtype.itemsize, work.sequences * work.keys * work.kv_heads * work.head_dim
    rows = work.sequences * work.rows * work.heads * work.head_dim
    flops = 4 * work.sequences * work.seen * work.heads * work.head_dim

    def error(out: object) -> float:
        wide = (part.float() for part in unpaged(work, k, v, table))
        return difference(out, dense(work, q.float(), *wide))

    # the weights are rounded before the product with V, and what comes out
    bound = 2 * rounding(dtype) if dtype.itemsize == 2 else 1e-5
    return Case("paged_attention", work.name, variants, 2 * size * (span + rows), flops, error, bound)


def inputs(work: Work, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, caches with pages in random order, block table, row starts and first positions."""
    pages = -(-(work.prefix + work.rows) // PAGE_SIZE)
    shape = (work.sequences * pages, PAGE_SIZE, work.kv_heads, work.head_dim)
    k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    q = torch.randn(work.sequences * work.rows, work.heads * work.head_dim, device=device, dtype=dtype)
    table = torch.randperm(shape[0], device=device).view(work.sequences, pages).int()
    starts = torch.arange(work.sequences + 1, device=device, dtype=torch.int32) * work.rows
    return q, k, v, table, starts, torch.full_like(starts[1:], work.prefix)


def unpaged(work: Work, k: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """K and V [sequences, kv_heads, length, head_dim] side by side, which peers without pages get for free."""
    length = work.prefix + work.rows
    k, v = (cache[table.long()].flatten(1, 2)[:, :length].transpose(1, 2).contiguous() for cache in (k, v))
    return k, v


def queries(work: Work, q: Tensor) -> Tensor:
    return q.view(work.sequences, work.rows, work.heads, work.head_dim).transpose(1, 2)


def packed(out: Tensor) -> Tensor:
    """[sequences, heads, rows, head_dim] -> [t, heads * head_dim]."""
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def mask(work: Work, device: torch.device) -> Tensor:
    query = torch.arange(work.prefix, work.prefix + work.rows, device=device)[:, None]
    key = torch.arange(work.prefix + work.rows, device=device)
    seen = key <= query
    return seen & (key > query - work.window) if work.window else seen


def dense(work: Work, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As transformers' eager attention does it."""
    group = work.heads // work.kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = queries(work, q) @ k.transpose(2, 3) * work.head_dim**-0.5
    if work.softcap:
        scores = work.softcap * torch.tanh(scores / work.softcap)
    scores = scores.masked_fill(~mask(work, q.device), float("-inf"))
    return packed(scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v)


def sdpa(work: Work, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Without a mask as a tensor, with which PyTorch would not take its flash attention; a single row sees every key."""
    seen = causal_lower_right(work.rows, work.prefix + work.rows) if work.rows > 1 else None
    return packed(F.scaled_dot_product_attention(queries(work, q), k, v, attn_mask=seen, enable_gqa=True))


def flex(work: Work, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Cap and mask compiled into PyTorch's kernel; which blocks the mask touches is found here, as once per step."""

    def score(s: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return work.softcap * torch.tanh(s / work.softcap) if work.softcap else s

    def seen(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        query = row + work.prefix
        return (key <= query) & (key > query - work.window) if work.window else key <= query

    blocks = create_block_mask(seen, None, None, work.rows, work.prefix + work.rows, device=q.device.type)
    attention = torch.compile(flex_attention, dynamic=False) if q.is_cuda else flex_attention

    def call() -> Tensor:
        out = attention(queries(work, q), k, v, score_mod=score, block_mask=blocks, enable_gqa=True)
        assert isinstance(out, Tensor)
        return packed(out)

    return call


def flash_attention_2(
    work: Work, q: Tensor, k: Tensor, v: Tensor, table: Tensor, starts: Tensor, first: Tensor
) -> Callable[[], Tensor]:
    """The same keys and values in runs of pages, as it needs them, one behind the other; what an engine makes once per step is
    made here. Where it is the faster one is what FASTER_FROM in engine/kernels/flash_attention.py is for."""
    missing = -table.shape[1] % PAGES_PER_RUN
    k_runs, v_runs = (F.pad(cache[table.long()], (0,) * 7 + (missing,)).flatten(0, 1) for cache in (k, v))
    pages = torch.arange(len(k_runs), device=q.device, dtype=torch.int32).view(work.sequences, -1)
    return functools.partial(
        paged_attention, q, k_runs, v_runs, pages, starts, first, heads=work.heads, scale=work.head_dim**-0.5,
        softcap=work.softcap, window=work.window, layout="nhd", flash=flash_indices(pages, starts, first), impl="flash",
    )  # fmt: skip


def flash_attention_3(
    work: Work, q: Tensor, k: Tensor, v: Tensor, table: Tensor, starts: Tensor, first: Tensor
) -> Tensor:
    """The version for Hopper, which takes pages of any size."""
    library = importlib.import_module("flash_attn_interface")
    out = library.flash_attn_with_kvcache(
        q.view(-1, work.heads, work.head_dim), k, v, cache_seqlens=first + work.rows, page_table=table,
        cu_seqlens_q=starts, max_seqlen_q=work.rows, softmax_scale=work.head_dim**-0.5, causal=True,
        window_size=(work.window - 1 if work.window else -1, -1), softcap=work.softcap or 0.0,
    )  # fmt: skip
    return out.flatten(1)
