"""A fault such as an illegal access spoils a process's use of its GPU: what is left to measure needs another process."""

import os
import sys
from typing import NoReturn

import torch


class DeviceLost(Exception):
    """Nothing more can be done on the GPU in this process; what was found is in the results."""


def lost(device: torch.device) -> bool:
    """Whether an error on this device stays until the process ends."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def start_over(module: str, *options: str) -> NoReturn:
    """Becomes a new process of ``python -m module`` with this one's options and others behind them, which count."""
    print(f"== the GPU reports a fault that stays: a new process goes on ({' '.join(options)})", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:], *options])
