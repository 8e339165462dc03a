"""Logits projection and sampling in one pass, by the Gumbel-max trick with noise that is fixed in advance.

argmax(z / T + g) with independent Gumbel noise g per token is a draw from softmax(z / T). Here g is a pure function of
(seed, position, token), so whoever computes a row, with whichever other rows, draws the same token.
"""

from typing import Literal

import torch
from torch import Tensor

from engine.kernels.gumbel_noise import gumbel_noise
from engine.kernels.linear import LinearWeight
from engine.kernels.linear_argmax import (
    MAX_LOGITS_BYTES,
    TRITON_INPUTS,
    largest,
    linear_argmax,
    logits,
    triton_takes,
)
from engine.kernels.softcap import check_softcap
from engine.kernels.triton_choice import choose_triton


def linear_sample(
    hidden: Tensor,
    weight: LinearWeight,
    bias: Tensor | None = None,
    *,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    softcap: float | None = None,
    row_count: Tensor | None = None,
    log_probability: bool = False,
    impl: Literal["auto", "torch", "triton"] = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The token that ``argmax(z / T + noise)`` gives for every row, the lowest index on ties, and its log-probability.

    hidden [m, d], weight [vocabulary, d], bias [vocabulary], softcap, row_count as for ``linear_argmax``; temperature [m]
    float32 (0: greedy), seeds and positions [m] int64 of ``gumbel_noise`` -> index [m] int64 (-1 where a row holds only
    NaN), log_probability [m] float32 where asked for: log softmax of the soft-capped logits at temperature 1, the model's
    own, whatever the temperature; NaN where the index is -1 or the largest logit is infinite.

    The reference computes noise and scores in float64. The Triton kernel computes them in float32, as z + T noise: its
    noise is off by at most 1e-6 * max(1, |noise|), the score rounded to float32, so that another token than the
    reference's is drawn where two scores are closer than that, or than the rounding of the logits.
    """
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f'impl must be "auto", "torch" or "triton", got {impl!r}')
    check_softcap(softcap)
    vectors = (temperature, seeds, positions)
    if any(t.shape != hidden.shape[:1] for t in vectors):
        raise ValueError(
            f"temperature, seeds and positions need one entry per row: got {[tuple(t.shape) for t in vectors]} for "
            f"{hidden.shape[0]} rows"
        )
    supported = (
        triton_takes(hidden, weight, bias, row_count)
        and [t.dtype for t in vectors] == [torch.float32, torch.int64, torch.int64]
        and all(t.is_contiguous() and t.device == hidden.device for t in vectors)
    )
    if choose_triton(impl, hidden, supported, f"{TRITON_INPUTS}, temperature float32, seeds and positions int64"):
        from engine.kernels.gpu import linear_sample as gpu

        with torch.cuda.device_of(hidden):  # Triton launches on the current device
            return gpu.linear_sample(
                hidden, weight.data, bias, temperature, seeds, positions, softcap, row_count, log_probability
            )
    index, log_p = _reference(hidden, weight, bias, temperature, seeds, positions, softcap, log_probability)
    if row_count is not None:
        unused = torch.arange(hidden.shape[0], device=hidden.device) >= row_count
        index = index.masked_fill(unused, -1)
        log_p = None if log_p is None else log_p.masked_fill(unused, float("nan"))
    return index, log_p


def _reference(
    hidden: Tensor, weight: LinearWeight, bias: Tensor | None, temperature: Tensor, seeds: Tensor, positions: Tensor,
    softcap: float | None, log_probability: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    index = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    log_p = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device) if log_probability else None
    greedy = temperature == 0
    divisor = temperature.double().masked_fill(greedy, 1.0)
    rows = max(1, MAX_LOGITS_BYTES // (8 * weight.rows))
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        z = logits(hidden[part], weight, bias, softcap=softcap).double()
        top = largest(z)[1].double()
        # the largest becomes 0: no temperature overflows it
        scores = (z - top.where(top.isfinite(), 0.0)[:, None]) / divisor[part, None]
        scores += gumbel_noise(seeds[part], positions[part], weight.rows)
        index[part] = largest(scores)[0]
        if greedy[part].any():
            # not from these logits: a greedy row has the bits that it has where nobody samples
            chosen = greedy[part].nonzero()[:, 0]
            index[start + chosen] = linear_argmax(hidden[start + chosen], weight, bias, softcap=softcap)[0]
        if log_p is not None:
            log_softmax = z.masked_fill(z.isnan(), float("-inf")).log_softmax(-1)
            token = index[part, None]
            log_p[part] = log_softmax.gather(1, token.clamp_min(0)).masked_fill(token < 0, float("nan"))[:, 0]
    return index, log_p
