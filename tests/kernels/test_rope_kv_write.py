import pytest
import torch
from torch import Tensor

from engine.kernels import PAGE_SIZE, kv_cache_shapes, kv_write, rope_kv_write
from engine.kernels.native import Impl
from tests.kernels import references
from tests.kernels.references import assert_accurate, randn, rotation_table

PAGES = 4
EPS = 1e-5


def caches(kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """With something in every slot, to see what is overwritten."""
    k_shape, v_shape = kv_cache_shapes(PAGES, kv_heads, head_dim)
    return randn(10, *k_shape, dtype=dtype), randn(11, *v_shape, dtype=dtype)


def slots_and_positions(rows: int) -> tuple[Tensor, Tensor]:
    """Slots over shuffled pages, the last one filled in part."""
    slots = torch.cat([torch.arange(page * PAGE_SIZE, (page + 1) * PAGE_SIZE) for page in (2, 0, 3, 1)])
    return slots[5 : 5 + rows].contiguous(), torch.arange(5, 5 + rows) * 7


def normalised_and_rotated(x: Tensor, rotation: Tensor, norm: Tensor | None) -> Tensor:
    return references.rotated(x if norm is None else references.rms_norm(x, norm.to(x.dtype), EPS), rotation)


@pytest.mark.parametrize("norms", ["", "q", "k", "qk"])
@pytest.mark.parametrize("head_dim", [8, 24, 80])
@pytest.mark.parametrize(("heads", "kv_heads", "rows"), [(1, 1, 1), (6, 2, 37), (3, 3, 64), (8, 1, 0)])
def test_rope_kv_write(heads: int, kv_heads: int, rows: int, head_dim: int, norms: str, impl: Impl) -> None:
    qkv = randn(0, rows, (heads + 2 * kv_heads) * head_dim)
    q_norm = randn(1, head_dim) if "q" in norms else None
    k_norm = randn(2, head_dim) if "k" in norms else None
    slots, positions = slots_and_positions(rows)
    table = rotation_table(600, head_dim)
    k_cache, v_cache = caches(kv_heads, head_dim)
    k_before, v_before, before = k_cache.clone(), v_cache.clone(), qkv.clone()
    rope_kv_write(
        qkv, table, positions, slots, k_cache, v_cache,
        head_dim=head_dim, q_norm=q_norm, k_norm=k_norm, eps=EPS, impl=impl,
    )  # fmt: skip

    q, k, v = before.unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    written = torch.zeros(PAGES, PAGE_SIZE, dtype=torch.bool)
    k_found, v_found = torch.empty_like(k), torch.empty_like(v)
    for row, slot in enumerate(slots.tolist()):
        page, offset = divmod(slot, PAGE_SIZE)
        written[page, offset] = True
        for head in range(kv_heads):
            k_found[row, head] = k_cache[page, head, :, offset]
            v_found[row, head] = v_cache[page, head, offset, :head_dim]
    for part, norm, found in (
        (q, q_norm, qkv[:, : heads * head_dim].unflatten(1, (heads, head_dim))),
        (k, k_norm, k_found),
    ):
        rotation = table[positions]
        exact = normalised_and_rotated(part.double(), rotation.double(), norm)
        plain = normalised_and_rotated(part, rotation, norm)
        x = part if norm is None else references.rms_norm(part, norm, EPS)
        low, high = x.abs().chunk(2, dim=-1)
        magnitude = (low + high).repeat(1, 1, 2)
        assert_accurate(found.flatten(1), exact.flatten(1), plain.flatten(1), magnitude.flatten(1))
    assert torch.equal(v_found, v)
    k_kept = ~written[:, None, None, :].expand_as(k_cache)
    v_kept = ~written[:, None, :, None].expand_as(v_cache).clone()
    v_kept[..., head_dim:] = True
    assert torch.equal(k_cache[k_kept], k_before[k_kept])
    assert torch.equal(v_cache[v_kept], v_before[v_kept])


def test_rows_keep_their_bits_in_any_batch(instruction_set: str) -> None:
    qkv, table, norm = randn(0, 64, 10 * 80), rotation_table(600, 80), randn(1, 80)
    slots, positions = slots_and_positions(64)

    def run(rows: list[int]) -> Tensor:
        part = qkv[rows]
        k_cache, v_cache = caches(2, 80)
        rope_kv_write(
            part, table, positions[rows], slots[rows], k_cache, v_cache,
            head_dim=80, q_norm=norm, k_norm=norm, impl="cpp",
        )  # fmt: skip
        page, offset = slots[rows] // PAGE_SIZE, slots[rows] % PAGE_SIZE
        return torch.cat((part, k_cache[page, :, :, offset].flatten(1), v_cache[page, :, offset].flatten(1)), dim=1)

    together = run(list(range(64)))
    for rows in ([9], [63, 0, 31], list(range(40, 20, -1))):
        assert torch.equal(run(rows), together[rows])


def test_layout_of_gpus_holds_the_same() -> None:
    qkv, table = randn(0, 37, 10 * 24), rotation_table(600, 24)
    slots, positions = slots_and_positions(37)
    found = []
    for layout in ("panels", "nhd"):
        k_shape, v_shape = kv_cache_shapes(PAGES, 2, 24, layout)
        part, k_cache, v_cache = qkv.clone(), torch.zeros(k_shape), torch.zeros(v_shape)
        rope_kv_write(part, table, positions, slots, k_cache, v_cache, head_dim=24, layout=layout, impl="torch")
        if layout == "panels":
            k_cache, v_cache = k_cache.permute(0, 3, 1, 2), v_cache.permute(0, 2, 1, 3)[..., :24]
        found.append((part, k_cache, v_cache))
    for panels, nhd in zip(*found, strict=True):
        assert torch.equal(panels, nhd)


def test_rows_of_no_slot_are_rotated_and_not_stored(impl: Impl) -> None:
    qkv, table = randn(0, 9, 10 * 24), rotation_table(600, 24)
    slots, positions = slots_and_positions(9)
    expected, part = qkv.clone(), qkv.clone()
    k_expected, v_expected = caches(2, 24)
    k_cache, v_cache = k_expected.clone(), v_expected.clone()
    stored = torch.tensor([0, 1, 3, 4, 7])
    rope_kv_write(
        first := expected[stored],
        table,
        positions[stored],
        slots[stored],
        k_expected,
        v_expected,
        head_dim=24,
        impl=impl,
    )
    gaps = torch.full_like(slots, -1)
    gaps[stored] = slots[stored]
    rope_kv_write(part, table, positions, gaps, k_cache, v_cache, head_dim=24, impl=impl)
    assert torch.equal(part[stored], first)
    assert torch.equal(k_cache, k_expected)
    assert torch.equal(v_cache, v_expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_write(dtype: torch.dtype) -> None:
    """Plain copies, cast to the dtype of the caches."""
    k, v = randn(0, 37, 2, 24), randn(1, 37, 2, 24)
    slots, _ = slots_and_positions(37)
    k_cache, v_cache = caches(2, 24, dtype)
    k_expected, v_expected = k_cache.clone(), v_cache.clone()
    for row, slot in enumerate(slots.tolist()):
        page, offset = divmod(slot, PAGE_SIZE)
        k_expected[page, :, :, offset] = k[row].to(dtype)
        v_expected[page, :, offset, :24] = v[row].to(dtype)
    kv_write(k, v, slots, k_cache, v_cache)
    assert torch.equal(k_cache, k_expected)
    assert torch.equal(v_cache, v_expected)


def test_refused_inputs(instruction_set: str) -> None:
    names = "qkv rotation positions slots k_cache v_cache q_norm".split()
    slots, positions = slots_and_positions(3)
    k_cache, v_cache = caches(2, 24)
    good = [randn(0, 3, 6 * 24), rotation_table(40, 24), positions, slots, k_cache, v_cache, randn(1, 24)]
    wrong = {
        "qkv": [good[0].double(), randn(0, 6 * 24, 3).T, randn(0, 3, 6 * 24 + 1), randn(0, 3, 3 * 24)],
        "rotation": [rotation_table(40, 26), good[1].bfloat16()],
        "positions": [positions.int(), positions[:2], torch.arange(6)[::2]],
        "slots": [slots.int(), slots[:2]],
        "k_cache": [k_cache.bfloat16(), k_cache[:, :, :20].contiguous(), k_cache[:2]],
        "v_cache": [v_cache.double(), v_cache[..., :24].contiguous()],
        "q_norm": [randn(1, 23), randn(1, 24).double()],
    }
    for name, tensors in wrong.items():
        for tensor in tensors:
            arguments = [tensor if n == name else t for n, t in zip(names, good, strict=True)]
            with pytest.raises(
                ValueError, match=r'impl="cpp" cannot run here: it needs contiguous float32 inputs and int64'
            ):
                rope_kv_write(*arguments[:6], head_dim=24, q_norm=arguments[6], impl="cpp")
    with pytest.raises(ValueError, match="impl must be"):
        rope_kv_write(*good[:6], head_dim=24, impl="none")  # type: ignore[arg-type]


def test_bfloat16_caches_take_the_reference(instruction_set: str) -> None:
    """float32 rows are rotated in float32 and rounded as they are stored."""
    qkv, table = randn(0, 3, 6 * 24), rotation_table(600, 24)
    slots, positions = slots_and_positions(3)
    k_cache, v_cache = caches(2, 24, torch.bfloat16)
    rope_kv_write(qkv, table, positions, slots, k_cache, v_cache, head_dim=24)
    page, offset = slots // PAGE_SIZE, slots % PAGE_SIZE
    rows = qkv.unflatten(1, (-1, 24))
    assert torch.equal(k_cache[page, :, :, offset], rows[:, 2:4].bfloat16())
    assert torch.equal(v_cache[page, :, offset, :24], rows[:, 4:].bfloat16())
