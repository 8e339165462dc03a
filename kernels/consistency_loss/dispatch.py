"""Which implementation of the consistency loss runs."""

import importlib
import os
from collections.abc import Callable

import torch

from engine.kernels.consistency_loss import native_loss, native_sparse, reference
from engine.kernels.consistency_loss.problem import Needs, Outcome, Problem

Solver = Callable[[Problem, Needs], Outcome]


def solve(p: Problem, needs: Needs, impl: str) -> Outcome:
    """Losses and gradients by the implementation asked for, or the fastest that runs here."""
    return _choose(p, impl)(p, needs)


def _choose(p: Problem, impl: str) -> Solver:
    if impl == "torch":
        return reference.loss_and_gradients
    if impl == "cpp":
        if reason := native_loss.reason_against(p):
            raise ValueError(f'impl="cpp" cannot run here: {reason}; use impl="auto" or impl="torch"')
        return _native(p)
    if impl == "triton":
        if reason := _against_triton(p):
            raise ValueError(f'impl="triton" cannot run here: {reason}; use impl="auto" or impl="torch"')
        return _triton()
    if p.weight.is_cpu:
        return reference.loss_and_gradients if native_loss.reason_against(p) else _native(p)
    return reference.loss_and_gradients if _against_triton(p) else _triton()


def _native(p: Problem) -> Solver:
    return native_sparse.loss_and_gradients if p.plan == "sparse" else native_loss.loss_and_gradients


def _against_triton(p: Problem) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if not p.weight.is_cuda and not (p.weight.is_cpu and interpreted):
        return f"it needs tensors on a GPU, got {p.weight.device}"
    if p.weight.dtype is torch.float64:
        return "it needs float32, bfloat16 or float16 tensors, got float64"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is not installed ({error})"
    return None


def _triton() -> Solver:
    # Imported at the first use: without a GPU nothing needs Triton.
    solver: Solver = importlib.import_module("engine.kernels.consistency_loss.triton").loss_and_gradients
    return solver
