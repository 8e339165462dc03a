"""Hidden states of a trained model (bench/trained_states.py makes them), and exact gradients at any vocabulary."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

BLOCK = 8192
"""Columns of the vocabulary whose logits exist at a time."""


def load(
    path: Path, rows: int, vocabulary: int, distance: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """target and draft [rows, D], weight [vocabulary, D], labels [rows]: the first rows with labels in that vocabulary.

    ``distance`` moves every draft row towards its target row until their relative distance is that: what training
    on them does.
    """
    states = load_file(path)
    kept = (states["labels"] < vocabulary).nonzero()[:rows, 0]
    if len(kept) < rows:
        raise ValueError(f"{path} has {len(kept)} rows with labels below {vocabulary}, {rows} are needed; make more")
    target, draft = states["target"][kept].float(), states["draft"][kept].float()
    if distance is not None:
        apart = draft - target
        draft = target + apart * (distance * target.norm(dim=-1) / apart.norm(dim=-1).clamp_min(1e-9))[:, None]
    return target, draft, states["weight"][:vocabulary].float(), states["labels"][kept]


def exact_gradients(leaves: list[Tensor], labels: Tensor, omega: float) -> list[Tensor]:
    """Of mean cross entropy + omega * mean KL in float64, for target, draft and head; no soft-cap.

    Written out and taken block by block: two float64 matrices of rows by vocabulary would take gigabytes.
    """
    target, draft, head = (leaf.detach() for leaf in leaves)
    n, hidden = len(target), torch.cat((target, draft)).double()
    blocks = head.split(BLOCK)
    lse = torch.stack([(hidden @ block.double().T).logsumexp(-1) for block in blocks]).logsumexp(0)
    grad_hidden, grad_head = torch.zeros_like(hidden), torch.empty_like(head, dtype=torch.float64)
    for index, block in enumerate(blocks):
        wide, start = block.double(), index * BLOCK
        p = (hidden @ wide.T - lse[:, None]).exp()
        g = torch.cat((p[:n], omega * (p[n:] - p[:n]))) / n
        here = ((labels >= start) & (labels < start + len(block))).nonzero()[:, 0]
        g[here, labels[here] - start] -= 1 / n
        grad_hidden += g @ wide
        grad_head[start : start + len(block)] = g.T @ hidden
    return [grad_hidden[:n], grad_hidden[n:], grad_head]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Of a matrix, in the Frobenius norm; float64 a block of rows at a time."""
    pairs = zip(actual.split(BLOCK), exact.split(BLOCK), strict=True)
    return float((sum(float((a.double() - e).square().sum()) for a, e in pairs) / exact.square().sum()) ** 0.5)
