"""Sampling that Jacobi iteration can converge on.

The Gumbel-max trick draws from softmax(z / T) as argmax(z / T + g) with independent Gumbel noise g per token. Here g is a
pure function of (seed, position, token): every position is coupled to fixed random numbers, so the fixed point of the
iteration is exactly the sample that decoding token by token with the same numbers gives, and its distribution is exact.
"""

import torch
from torch import Tensor

from engine.kernels import linear_sample
from engine.kernels.gumbel_noise import gumbel_noise
from engine.kernels.linear_argmax import MAX_LOGITS_BYTES, logits
from engine.model import Head


def sample(hidden: Tensor, head: Head, seeds: Tensor, positions: Tensor, temperature: float, top_p: float) -> Tensor:
    """The token of every row of ``hidden`` [rows, d] -> [rows] int64, -1 where the logits are NaN.

    ``positions`` [rows] int64 are response positions. Logits are made for a bounded number of rows at a time.
    """
    if top_p == 1 or temperature == 0:
        temperatures = torch.full(seeds.shape, temperature, dtype=torch.float32, device=hidden.device)
        return linear_sample(
            hidden, head.weight, head.bias, temperature=temperatures, seeds=seeds, positions=positions,
            softcap=head.softcap,
        )[0]  # fmt: skip
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
        scores = scores.masked_fill(~nucleus(scores.softmax(-1), top_p), float("-inf"))
        scores += gumbel_noise(seeds[part], positions[part], vocabulary)
        tokens[part] = scores.argmax(-1).masked_fill(broken, -1)
    return tokens


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Mask of the smallest set of most probable tokens of each row whose mass reaches ``top_p``; on ties lower indices."""
    ordered, order = probabilities.sort(stable=True, dim=-1, descending=True)
    kept = ordered.cumsum(-1) - ordered < top_p
    return torch.zeros_like(kept).scatter(-1, order, kept)
