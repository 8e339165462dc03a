"""Logits projection and argmax in one pass: the [rows, vocabulary] logits are never held."""

import torch
from torch import Tensor

from engine.kernels.linear import WEIGHT_TYPES, LinearWeight, linear
from engine.kernels.native import Impl, address, choose, new_output
from engine.kernels.softcap import check_softcap
from engine.kernels.triton_choice import choose_triton

MAX_LOGITS_BYTES = 1 << 24  # what the reference materialises at a time
TRITON_INPUTS = (
    "contiguous inputs on one device, hidden [m, d] and a plain (not packed) weight [vocabulary, d] of one dtype, and "
    "int32 row_count [1]"
)


def linear_argmax(
    hidden: Tensor,
    weight: LinearWeight,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    row_count: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Index and value of the largest logit of every row; the lowest index on ties.

    hidden [m, d], weight [vocabulary, d], bias [vocabulary] -> index [m] int64 (-1 where a row holds only NaN, which
    otherwise never wins), value [m] float32 (NaN where the index is -1), after the soft-cap
    ``softcap * tanh(z / softcap)`` (Gemma-2) where one is given; None and 0.0 are none. ``row_count`` int32 [1], on
    hidden's device: rows from there on fill up a batch, their index is -1. On a GPU nothing waits for the device, and
    rows that are not in use cost nothing.
    """
    check_softcap(softcap)
    if choose_triton(impl, hidden, triton_takes(hidden, weight, bias, row_count), TRITON_INPUTS):
        from engine.kernels.gpu import linear_argmax as gpu

        with torch.cuda.device_of(hidden):  # Triton launches on the current device
            return gpu.linear_argmax(hidden, weight.data, bias, softcap, row_count)
    library = choose(impl, weight.takes(hidden, bias), "a packed weight and contiguous float32 inputs of its shape")
    if library is None:
        index, value = _reference(hidden, weight, bias, softcap)
    else:
        m = hidden.shape[0]
        index, value = new_output(m, dtype=torch.int64), new_output(m)
        library.module.linear_argmax(
            library.table, hidden.data_ptr(), weight.data.data_ptr(), address(bias), 0, m, weight.rows, weight.columns,
            WEIGHT_TYPES[weight.data.dtype], library.threads, softcap or 0.0, index.data_ptr(), value.data_ptr(),
        )  # fmt: skip
    if row_count is not None:
        unused = torch.arange(hidden.shape[0], device=hidden.device) >= row_count
        index, value = index.masked_fill(unused, -1), value.masked_fill(unused, float("nan"))
    return index, value


def triton_takes(hidden: Tensor, weight: LinearWeight, bias: Tensor | None, row_count: Tensor | None) -> bool:
    """Whether the Triton kernels of this projection can read these."""
    tensors = [t for t in (hidden, weight.data, bias, row_count) if t is not None]
    return (
        not weight.packed
        and hidden.shape[1:] == (weight.columns,)
        and hidden.dtype == weight.data.dtype
        and (bias is None or bias.shape == (weight.rows,))
        and (row_count is None or (row_count.shape == (1,) and row_count.dtype is torch.int32))
        and all(t.is_contiguous() and t.device == hidden.device for t in tensors)
        and weight.rows > 0
    )


def logits(hidden: Tensor, weight: LinearWeight, bias: Tensor | None = None, *, softcap: float | None = None) -> Tensor:
    """The [m, vocabulary] float32 logits themselves, for few rows at a time: sampling, references."""
    check_softcap(softcap)
    z = linear(hidden, weight, bias).float()
    return softcap * torch.tanh(z / softcap) if softcap else z


def largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of every row [m, n]: the lowest index of the largest value, -1 where all are NaN, and that value."""
    nan = values.isnan()
    values = values.masked_fill(nan, float("-inf"))
    best = values.amax(-1)
    # argmax on its own leaves open which of several equal values it names
    index = ((values == best[:, None]) & ~nan).to(torch.uint8).argmax(-1)
    broken = nan.all(-1)
    return index.masked_fill(broken, -1), best.masked_fill(broken, float("nan"))


def _reference(
    hidden: Tensor, weight: LinearWeight, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    index = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    value = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    rows = max(1, MAX_LOGITS_BYTES // (4 * weight.rows))
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        index[part], value[part] = largest(logits(hidden[part], weight, bias, softcap=softcap))
    return index, value
