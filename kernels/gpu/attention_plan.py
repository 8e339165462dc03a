"""How paged attention divides its work: tiles by chip, type and shape, and in how many parts the keys of a tile are."""

import functools
from dataclasses import dataclass

import torch

MAX_HEAD_DIM = 256
MAX_GROUP = 128
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
    """What one program takes at a time: ``lines`` (rows times query heads of a KV head) by ``keys``."""

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


def tiles(capability: int, dtype: torch.dtype, head_dim: int, lines: int) -> Tiles:
    """For sequences of about ``lines`` lines."""
    return Tiles(16 if lines <= 16 else 64 if lines <= 64 else 128, 64, 4, 3, 2)


def plan(
    chip: Chip, dtype: torch.dtype, head_dim: int, group: int, kv_heads: int, t: int, sequences: int, window: int,
    longest: int,
) -> Plan:  # fmt: skip
    """For ``t`` rows of ``sequences`` sequences, whose last positions are below ``longest``."""
    typical = -(-t // sequences)  # rows of a sequence, the only guess that shapes allow
    tile = tiles(chip.capability, dtype, head_dim, max(group, min(128, typical * group)))
    rows = tile.lines // group
    busy = sequences * -(-typical // rows) * kv_heads
    keys = min(longest, window + rows) if window else longest
    parts = -(-keys // tile.keys) // MIN_TILES
    splits = max(1, min(chip.multiprocessors * tile.resident // busy, parts, MAX_SPLITS))
    return Plan(tile, rows, t // rows + sequences, splits)
