"""The consistency loss on GPUs: one function for three plans."""

from collections.abc import Callable

import torch

from engine.kernels.consistency_loss.problem import Needs, Outcome, Problem

MAX_VOCABULARY = 1 << 24  # indices of columns are kept as float32 beside the other sums


def loss_and_gradients(p: Problem, needs: Needs) -> Outcome:
    """Cross entropy, divergence and the wanted gradients by ``p.plan``: "dense" or "recompute"."""
    if p.weight.shape[0] >= MAX_VOCABULARY:
        raise ValueError(
            f'impl="triton" takes vocabularies below {MAX_VOCABULARY}, got {p.weight.shape[0]}; use "torch"'
        )
    if p.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f'impl="triton" takes float32, bfloat16 or float16, got {p.weight.dtype}; cast or use "torch"')
    with torch.cuda.device_of(p.weight):  # Triton launches on the current device
        return _implementation(p.plan)(p, needs)


def _implementation(plan: str) -> Callable[[Problem, Needs], Outcome]:
    """Imports Triton only now: without it, or a GPU, the rest of the package works."""
    if plan == "dense":
        from engine.kernels.consistency_loss import triton_dense

        return triton_dense.loss_and_gradients
    if plan == "recompute":
        from engine.kernels.consistency_loss import triton_recompute

        return triton_recompute.loss_and_gradients
    raise ValueError(f'impl="triton" has the plans "dense" and "recompute", got plan={plan!r}')
