"""The consistency loss on GPUs: one function for its plans."""

from collections.abc import Callable

import torch

from engine.kernels.consistency_loss.problem import Needs, Outcome, Problem
from engine.kernels.consistency_loss.triton_products import ask_once

MAX_VOCABULARY = 1 << 24  # indices of columns are kept as float32 beside the other sums
HEADROOM = 0.9  # of the memory that is free: the allocator cannot use every gap


def loss_and_gradients(p: Problem, needs: Needs) -> Outcome:
    """Cross entropy, divergence and the wanted gradients by ``p.plan``: "dense", "recompute", "sparse" or "auto"."""
    v = p.weight.shape[0]
    if v >= MAX_VOCABULARY:
        raise ValueError(f'impl="triton" takes vocabularies below {MAX_VOCABULARY}, got {v}; use impl="torch"')
    if p.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f'impl="triton" takes float32, bfloat16 or float16, got {p.weight.dtype}; cast or use "torch"')
    with torch.cuda.device_of(p.weight):  # Triton launches on the current device
        if needs.weight:  # only what sums over the rows of several chunks, or over blocks of W, adds
            ask_once(p.weight)
        return _implementation(p, needs)(p, needs)


def _implementation(p: Problem, needs: Needs) -> Callable[[Problem, Needs], Outcome]:
    """Imports Triton only now: without it, or a GPU, the rest of the package works."""
    if p.plan not in ("auto", "dense", "recompute", "sparse"):
        raise ValueError(
            f'impl="triton" offers plan="auto", "dense", "recompute", "sparse", got {p.plan!r}; use one of these'
        )
    from engine.kernels.consistency_loss import triton_dense, triton_recompute, triton_sparse

    if p.plan == "sparse":
        return triton_sparse.loss_and_gradients
    dense = p.plan == "dense" or (p.plan == "auto" and _fits(p, triton_dense.peak_bytes(p, needs)))
    return triton_dense.loss_and_gradients if dense else triton_recompute.loss_and_gradients


def _fits(p: Problem, wanted: int) -> bool:
    """Whether so many bytes are free on the device, cached ones included.

    Of a graph that is being captured always: its memory comes from a pool of its own, so that what was cached when it was
    warmed up says nothing, and a graph keeps its plan whatever is free when it is replayed.
    """
    if not p.weight.is_cuda or torch.cuda.is_current_stream_capturing():
        return True
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return wanted <= HEADROOM * (torch.cuda.mem_get_info()[0] + cached)
