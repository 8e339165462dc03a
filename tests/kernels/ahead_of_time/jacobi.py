"""The kernels that move Jacobi iteration on the device."""

import torch

from engine.kernels import JacobiState, NoiseRows, PackedRows
from engine.kernels.gpu import jacobi_accept, jacobi_pack
from tests.kernels.ahead_of_time.compiling import Launch, distinct, meta, recording

MODULES = (jacobi_accept, jacobi_pack)
SHAPES = {"1 slot, 16 rows": (1, 16), "64 slots, 2048 rows": (64, 2048), "512 slots, 4096 rows": (512, 4096)}
PLACES, PAGES = 4097, 512


def multiplies(kernel: str, shape: str) -> bool:
    return False


def launches(shape: str) -> list[Launch]:
    slots, size = SHAPES[shape]
    device = torch.device("meta")
    state = JacobiState.allocate(slots, PLACES, PAGES, device)
    rows = PackedRows.allocate(size, slots, device)
    predictions, eos = meta(size, dtype=torch.int64), meta(2, dtype=torch.int32)
    with recording(*MODULES) as found:
        jacobi_pack.pack(state, rows, 200, None)
        jacobi_pack.pack(state, rows, 200, NoiseRows.allocate(size, device))
        jacobi_accept.accept(state, predictions, rows.row_start, eos)
    return distinct(found)
