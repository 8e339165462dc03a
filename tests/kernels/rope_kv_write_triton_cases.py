"""Triton's rotation and cache write against float64, on a GPU or, with TRITON_INTERPRET=1, on a CPU."""

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.kernels import PAGE_SIZE, kv_cache_shapes, rope_kv_write
from tests.kernels import references
from tests.kernels.references import assert_accurate, randn, rotated, rotation_table
from tests.kernels.triton_device import DEVICE

EPS, PAGES, POSITIONS = 1e-6, 5, 300
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def make(
    rows: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """qkv, rotation, positions, slots (every fourth -1) and caches of NaN."""
    generator = torch.Generator().manual_seed(rows)
    slots = torch.randperm(PAGES * PAGE_SIZE, generator=generator)[:rows]
    slots[3::4] = -1
    positions = torch.randint(POSITIONS, (rows,), generator=generator)
    shape, _ = kv_cache_shapes(PAGES, kv_heads, head_dim, "nhd")
    caches = [torch.full(shape, float("nan"), dtype=cache_dtype or dtype) for _ in "kv"]
    qkv = randn(0, rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    return [t.to(DEVICE) for t in (qkv, rotation_table(POSITIONS, head_dim), positions, slots, *caches)]


def exactly(x: Tensor, rotation: Tensor, norm: Tensor | None) -> tuple[Tensor, Tensor]:
    """In float64, and the sizes of the terms."""
    x = x.double() if norm is None else references.rms_norm(x.double(), norm.double(), EPS)
    low, high = x.abs().chunk(2, dim=-1)
    return rotated(x, rotation.double()), (low + high).repeat(1, 1, 2)


@dtypes
@pytest.mark.parametrize("norms", ["", "q", "qk"])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "head_dim"),
    [(1, 4, 2, 64), (5, 9, 1, 24), (3, 2, 9, 2), (9, 3, 3, 80), (2, 4, 1, 256), (4, 8, 2, 128), (3, 14, 2, 96)],
)  # fmt: skip
def test_against_float64(rows: int, heads: int, kv_heads: int, head_dim: int, norms: str, dtype: torch.dtype) -> None:
    given = make(rows, heads, kv_heads, head_dim, dtype)
    qkv, table, positions, slots, k_cache, v_cache = given
    norm = [randn(i, head_dim).to(DEVICE) if part in norms else None for i, part in enumerate("qk")]
    options = {"head_dim": head_dim, "q_norm": norm[0], "k_norm": norm[1], "eps": EPS, "layout": "nhd"}
    before, plain = qkv.clone(), qkv.clone()
    rope_kv_write(plain, table, positions, slots, k_cache.clone(), v_cache.clone(), **options, impl="torch")
    rope_kv_write(*given, **options, impl="triton")

    sizes = [heads, kv_heads, kv_heads]
    parts, plains, founds = (x.unflatten(1, (-1, head_dim)).split(sizes, dim=1) for x in (before, plain, qkv))
    for i in range(2):
        exact, magnitude = exactly(parts[i], table[positions], norm[i])
        found = founds[i].double().flatten(1)
        assert_accurate(found, exact.flatten(1), plains[i].flatten(1), magnitude.flatten(1))
    assert torch.equal(founds[2], parts[2])
    stored = slots >= 0
    k_expected, v_expected = torch.full_like(k_cache, float("nan")), torch.full_like(v_cache, float("nan"))
    k_expected.flatten(0, 1)[slots[stored]], v_expected.flatten(0, 1)[slots[stored]] = (
        founds[1][stored],
        parts[2][stored],
    )
    assert torch.equal(k_cache.nan_to_num(7.0), k_expected.nan_to_num(7.0))
    assert torch.equal(v_cache.nan_to_num(7.0), v_expected.nan_to_num(7.0))


@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
@dtypes
def test_rows_keep_their_bits_in_any_batch(dtype: torch.dtype, norms: bool) -> None:
    qkv, table, positions, slots, k_cache, v_cache = make(12, 6, 2, 80, dtype)
    norm = randn(1, 80).to(DEVICE) if norms else None

    def run(rows: list[int]) -> Tensor:
        part = qkv[rows]
        rope_kv_write(
            part, table, positions[rows], slots[rows], k_cache, v_cache,
            head_dim=80, q_norm=norm, k_norm=norm, layout="nhd", impl="triton",
        )  # fmt: skip
        return part

    together = run(list(range(12)))
    for rows in ([9], [11, 0, 5], list(range(10, 4, -1))):
        assert torch.equal(run(rows), together[rows])


def test_caches_of_another_dtype_get_what_the_row_holds() -> None:
    given = make(6, 4, 2, 64, torch.float32, torch.bfloat16)
    rope_kv_write(*given, head_dim=64, layout="nhd", impl="triton")
    qkv, _, _, slots, k_cache, v_cache = given
    stored, rows = slots >= 0, qkv.unflatten(1, (-1, 64))
    assert torch.equal(k_cache.flatten(0, 1)[slots[stored]], rows[stored, 4:6].bfloat16())
    assert torch.equal(v_cache.flatten(0, 1)[slots[stored]], rows[stored, 6:].bfloat16())


def test_no_rows() -> None:
    given = make(0, 4, 2, 64, torch.bfloat16)
    rope_kv_write(*given, head_dim=64, layout="nhd", impl="triton")
    assert given[4].isnan().all()


def test_refused_inputs() -> None:
    good = make(3, 2, 2, 24, torch.bfloat16)
    qkv, table, positions, slots, k_cache, v_cache = good
    wrong = [
        {0: qkv.double()}, {0: qkv[:, :-1].contiguous()}, {0: qkv[:, :72].contiguous()}, {1: table.bfloat16()},
        {1: table[:, :22].contiguous()}, {2: positions.int()}, {2: positions[:2]}, {3: slots.int()},
        {4: k_cache.float()}, {4: k_cache[:2]}, {5: v_cache.transpose(0, 1)},
    ]  # fmt: skip
    for change in wrong:
        arguments = [change.get(i, tensor) for i, tensor in enumerate(good)]
        with pytest.raises(ValueError, match=r'impl="triton" cannot run here: it needs'):
            rope_kv_write(*arguments, head_dim=24, layout="nhd", impl="triton")
    with pytest.raises(ValueError, match=r'impl="triton" cannot run here: it needs'):
        rope_kv_write(*good, head_dim=24, q_norm=torch.ones(24, device=DEVICE).half(), layout="nhd", impl="triton")
    panels = [torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE) for shape in kv_cache_shapes(PAGES, 2, 24)]
    with pytest.raises(ValueError, match=r'impl="triton" cannot run here: it needs'):
        rope_kv_write(qkv, table, positions, slots, *panels, head_dim=24, impl="triton")


def test_slots_above_two_to_the_31() -> None:
    """Elements of a cache; its pages take memory only where they are touched."""
    kv_heads, head_dim = 8, 128
    pages = (1 << 31) // (PAGE_SIZE * kv_heads * head_dim) + 2
    qkv, table, positions, slots, k_cache, v_cache = make(2, 8, kv_heads, head_dim, torch.float16)
    shape, _ = kv_cache_shapes(pages, kv_heads, head_dim, "nhd")
    storage = [
        torch.from_numpy(np.zeros(shape, np.float16))
        if DEVICE == "cpu"
        else torch.zeros(shape, dtype=torch.float16, device=DEVICE)
        for _ in "kv"
    ]
    high = torch.tensor([pages * PAGE_SIZE - 1, pages * PAGE_SIZE - 40], device=DEVICE)
    rope_kv_write(
        qkv.clone(), table, positions, slots, k_cache, v_cache, head_dim=head_dim, layout="nhd", impl="triton"
    )
    rope_kv_write(qkv, table, positions, high, *storage, head_dim=head_dim, layout="nhd", impl="triton")
    for cache, expected in zip(storage, (k_cache, v_cache), strict=True):
        assert torch.equal(cache.flatten(0, 1)[high], expected.flatten(0, 1)[slots])
