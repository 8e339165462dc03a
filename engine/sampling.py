"""Sampling that Jacobi iteration can converge on.

The Gumbel-max trick draws from softmax(z / T) as argmax(z / T + g) with independent Gumbel noise g per token. Here g is a
pure function of (seed, position, token): every position is coupled to fixed random numbers, so the fixed point of the
iteration is exactly the sample that decoding token by token with the same numbers gives, and its distribution is exact.
"""

import torch
from torch import Tensor

from engine.kernels.linear_argmax import MAX_LOGITS_BYTES, logits
from engine.model import Head

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, the increment of splitmix64
_MIX = (-4658895280553007687, -7723592293110705685)  # its two multipliers
_BITS = 52


def gumbel_noise(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise [rows, vocabulary] float64 for int64 seeds and positions [rows].

    A counter-based generator: splitmix64's finaliser over seed, position and token, on any device, in any order.
    """
    key = _mix(_mix(seeds + _GOLDEN) + positions * _GOLDEN)
    token = torch.arange(1, vocabulary + 1, device=seeds.device)
    bits = (_mix(key[:, None] + token * _GOLDEN) >> (64 - _BITS)) & ((1 << _BITS) - 1)
    uniform = (bits.double() + 0.5) * 2.0**-_BITS  # exact, never 0 or 1
    return -torch.log(-torch.log(uniform))


def sample(hidden: Tensor, head: Head, seeds: Tensor, positions: Tensor, temperature: float, top_p: float) -> Tensor:
    """The token of every row of ``hidden`` [rows, d] -> [rows] int64, -1 where the logits are NaN.

    ``positions`` [rows] int64 are response positions. Logits are made for a bounded number of rows at a time.
    """
    vocabulary = head.weight.rows
    rows = max(1, MAX_LOGITS_BYTES // (8 * vocabulary))
    tokens = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        scores = logits(hidden[part], head.weight, head.bias, softcap=head.softcap).double()
        nan = scores.isnan()
        broken = nan.all(-1)
        scores = scores.masked_fill(nan, float("-inf"))
        scores = (scores - scores.amax(-1, keepdim=True)) / temperature  # the largest is 0: no temperature overflows it
        if top_p < 1:
            scores = scores.masked_fill(~nucleus(scores.softmax(-1), top_p), float("-inf"))
        scores += gumbel_noise(seeds[part], positions[part], vocabulary)
        tokens[part] = scores.argmax(-1).masked_fill(broken, -1)
    return tokens


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Mask of the smallest set of most probable tokens of each row whose mass reaches ``top_p``; on ties lower indices."""
    ordered, order = probabilities.sort(stable=True, dim=-1, descending=True)
    kept = ordered.cumsum(-1) - ordered < top_p
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
        x = (x ^ _shift(x, shift)) * factor
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
