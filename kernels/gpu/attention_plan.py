"""How paged attention divides its work: tiles by chip, type and shape, and in how many parts the keys of a tile are."""

import functools
from dataclasses import dataclass

import torch

MAX_SPLITS = 128
MIN_TILES = 2
"""Of keys per program: with fewer, a program ends before a second one could be on its way."""


@dataclass(frozen=True, slots=True)
class Chip:
    capability: int
    """Ten times CUDA's compute capability."""
    multiprocessors: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """What one program takes at a time: ``lines`` (rows times the query heads of a KV head) by ``keys``."""

    lines: int
    keys: int
    warps: int
    stages: int
    resident: int
    """Programs that share a multiprocessor, by their registers and shared memory."""


@dataclass(frozen=True, slots=True)
class Plan:
    tiles: Tiles
    rows: int
    """Of a tile."""
    row_tiles: int
    """At least as many as any division of the rows into sequences makes."""
    splits: int
    """Parts that the keys of every tile are divided into."""


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """What is here; in Triton's interpreter a small one, on which keys are divided at test sizes too."""
    if device.type != "cuda":
        return Chip(90, 4)
    properties = torch.cuda.get_device_properties(device)
    return Chip(10 * properties.major + properties.minor, properties.multi_processor_count)


_ByColumns = dict[int, tuple[Tiles, ...]]
_HOPPER: _ByColumns = {
    64: (Tiles(16, 128, 4, 3, 3), Tiles(64, 64, 4, 3, 3), Tiles(128, 64, 8, 3, 1)),
    128: (Tiles(16, 64, 4, 3, 3), Tiles(64, 64, 4, 3, 2), Tiles(128, 64, 8, 3, 1)),
    256: (Tiles(16, 32, 4, 4, 2), Tiles(64, 32, 8, 3, 1), Tiles(128, 32, 8, 3, 1)),
}
_TILES: dict[int, _ByColumns] = {
    80: {
        64: (Tiles(16, 128, 4, 3, 2), Tiles(64, 64, 4, 3, 2), Tiles(128, 64, 8, 3, 1)),
        128: (Tiles(16, 64, 4, 3, 2), Tiles(64, 64, 8, 3, 1), Tiles(128, 64, 8, 3, 1)),
        256: (Tiles(16, 32, 4, 4, 1), Tiles(64, 32, 8, 3, 1), Tiles(64, 32, 8, 3, 1)),
    },
    90: _HOPPER,
    100: _HOPPER | {256: (Tiles(16, 16, 4, 4, 3), Tiles(64, 32, 8, 3, 1), Tiles(64, 64, 8, 2, 1))},
}
_SMALL_CHIPS: _ByColumns = {  # 99 KiB of shared memory
    64: (Tiles(16, 128, 4, 3, 1), Tiles(64, 64, 4, 3, 2), Tiles(64, 64, 4, 3, 2)),
    128: (Tiles(16, 64, 4, 3, 1), Tiles(64, 32, 4, 3, 1), Tiles(64, 32, 4, 3, 1)),
    256: (Tiles(16, 32, 4, 3, 1), Tiles(64, 32, 8, 2, 1), Tiles(64, 32, 8, 2, 1)),
}
_FLOAT32: _ByColumns = {  # without tensor cores, and of 256 columns no more lines than 32 without spills
    64: (Tiles(16, 32, 8, 2, 2), Tiles(64, 32, 8, 2, 1)),
    128: (Tiles(16, 32, 8, 2, 1), Tiles(64, 32, 8, 2, 1)),
    256: (Tiles(16, 32, 8, 1, 1), Tiles(32, 32, 8, 1, 1)),
}


def tiles(capability: int, dtype: torch.dtype, head_dim: int, lines: int) -> Tiles:
    """For sequences of about ``lines`` lines: of few, some and many, by columns.

    Chosen from registers, spills and shared memory of the compiled kernels (bench/results/triton_aot), not from a
    measurement. Few lines wait for memory, so several programs per multiprocessor have two or three tiles of keys on
    their way each. 64 lines are what wgmma takes, with 128 K and V are read half as often. Where the sums of a tile fill
    the registers, tiles of keys are short.
    """
    family = _TILES.get(100 if capability == 103 else capability, _SMALL_CHIPS)
    by_columns = _FLOAT32 if dtype is torch.float32 else family
    return by_columns[64 if head_dim <= 64 else 128 if head_dim <= 128 else 256][(lines > 16) + (lines > 64)]


def plan(
    chip: Chip, dtype: torch.dtype, head_dim: int, group: int, kv_heads: int, t: int, sequences: int, window: int,
    longest: int,
) -> Plan:  # fmt: skip
    """For ``t`` rows of ``sequences`` sequences, whose last positions are below ``longest``."""
    typical = -(-t // sequences)  # rows of a sequence, the only guess that shapes allow
    lines = group if dtype is torch.float32 else typical * group
    tile = tiles(chip.capability, dtype, head_dim, lines)
    rows = tile.lines // group
    busy = sequences * -(-typical // rows) * kv_heads
    keys = min(longest, window + rows) if window else longest
    parts = -(-keys // tile.keys) // MIN_TILES
    splits = max(1, min(chip.multiprocessors * tile.resident // busy, parts, MAX_SPLITS))
    return Plan(tile, rows, t // rows + sequences, splits)
