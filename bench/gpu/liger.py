"""Kernels of liger-kernel, the best known Triton library for training, where it is installed."""

import importlib
from collections.abc import Callable
from typing import Any


def forward(module: str, function: str) -> Callable[..., Any] | None:
    """The forward pass of ``liger_kernel.ops.<module>.<function>``; None where this version, or none at all, has it."""
    try:
        apply: Callable[..., Any] = getattr(importlib.import_module(f"liger_kernel.ops.{module}"), function).apply
    except (ImportError, AttributeError):
        return None
    return apply
