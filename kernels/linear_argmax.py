"""Logits projection and argmax in one pass: the [rows, vocabulary] logits are never held."""

import torch
from torch import Tensor

from engine.kernels.linear import _WEIGHT_TYPES, LinearWeight, linear
from engine.kernels.native import Impl, address, choose, new_output

MAX_LOGITS_BYTES = 1 << 24  # what the reference materialises at a time


def linear_argmax(
    hidden: Tensor,
    weight: LinearWeight,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Index and value of the largest logit of every row; the lowest index on ties.

    hidden [m, d], weight [vocabulary, d], bias [vocabulary] -> index [m] int64 (-1 where a row holds only NaN),
    value [m] float32, after the soft-cap ``softcap * tanh(z / softcap)`` (Gemma-2) where one is given.
    """
    library = choose(impl, weight.takes(hidden, bias), "a packed weight and contiguous float32 inputs of its shape")
    if library is None:
        return _reference(hidden, weight, bias, softcap)
    m = hidden.shape[0]
    index, value = new_output(m, dtype=torch.int64), new_output(m)
    library.module.linear_argmax(
        library.table, hidden.data_ptr(), weight.data.data_ptr(), address(bias), 0, m, weight.rows, weight.columns,
        _WEIGHT_TYPES[weight.data.dtype], library.threads, softcap or 0.0, index.data_ptr(), value.data_ptr(),
    )  # fmt: skip
    return index, value


def logits(hidden: Tensor, weight: LinearWeight, bias: Tensor | None = None, *, softcap: float | None = None) -> Tensor:
    """The [m, vocabulary] float32 logits themselves, for few rows at a time: sampling, references."""
    z = linear(hidden, weight, bias).float()
    return softcap * torch.tanh(z / softcap) if softcap else z


def _reference(
    hidden: Tensor, weight: LinearWeight, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    index = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    value = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    rows = max(1, MAX_LOGITS_BYTES // (4 * weight.rows))
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        z = logits(hidden[part], weight, bias, softcap=softcap)
        nan = z.isnan()
        z = z.masked_fill(nan, float("-inf"))
        best = z.amax(-1)
        # argmax on its own leaves open which of several equal values it names
        lowest = ((z == best[:, None]) & ~nan).to(torch.uint8).argmax(-1)
        broken = nan.all(-1)
        index[part], value[part] = lowest.masked_fill(broken, -1), best.masked_fill(broken, float("nan"))
    return index, value
