"""Which implementation of the consistency loss runs."""

import importlib
from collections.abc import Callable

from engine.kernels.consistency_loss import native_loss, native_sparse, reference
from engine.kernels.consistency_loss.problem import Needs, Outcome, Problem
from engine.kernels.triton_choice import reason_against_triton

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
        if reason := reason_against_triton(p.weight):
            raise ValueError(f'impl="triton" cannot run here: {reason}; use impl="auto" or impl="torch"')
        return _triton()
    if p.weight.is_cpu:
        return reference.loss_and_gradients if native_loss.reason_against(p) else _native(p)
    return reference.loss_and_gradients if reason_against_triton(p.weight) else _triton()


def _native(p: Problem) -> Solver:
    return native_sparse.loss_and_gradients if p.plan == "sparse" else native_loss.loss_and_gradients


def _triton() -> Solver:
    # Imported at the first use: without a GPU nothing needs Triton.
    solver: Solver = importlib.import_module("engine.kernels.consistency_loss.triton").loss_and_gradients
    return solver
