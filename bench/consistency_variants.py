"""The consistency loss and what it is measured against: shapes, inputs, and the same loss written with other means."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.consistency_states import load
from engine import consistency_loss

OMEGA = 1e3
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, float | None], Tensor]
"""Target and draft hidden states, head, labels, soft-cap -> loss."""


@dataclass(frozen=True)
class Shape:
    """Rows of each stream, hidden size, vocabulary; random inputs, or hidden states of a trained model from a file."""

    rows: int
    d: int
    v: int
    dtype: torch.dtype
    softcap: float | None = None
    states: Path | None = None
    filters: tuple[float, ...] = ()
    """Values of filter_eps to measure the sparse plan with."""


SHAPES = {
    "fp32-32k": Shape(512, 1024, 32000, torch.float32),
    "bf16-32k": Shape(512, 1024, 32000, torch.bfloat16),
    "fp32-32k-softcap": Shape(512, 1024, 32000, torch.float32, 30.0),
    "bf16-32k-softcap": Shape(512, 1024, 32000, torch.bfloat16, 30.0),
    "fp32-128k": Shape(512, 1024, 128256, torch.float32),
    "bf16-128k": Shape(512, 1024, 128256, torch.bfloat16),
    "bf16-256k-softcap": Shape(1024, 2304, 256000, torch.bfloat16, 30.0),
}


def known_shapes(states: Path | None, filters: tuple[float, ...]) -> dict[str, Shape]:
    """SHAPES, a small one, and those on hidden states of a trained model where a file of them is given."""
    shapes = SHAPES | {"quick": Shape(96, 256, 8000, torch.float32)}
    if states is not None:
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            shapes[f"states-{name}"] = Shape(512, 1024, 128256, dtype, None, states, filters)
        shapes["states-quick"] = Shape(96, 1024, 8000, torch.float32, None, states, filters)
    return shapes


def inputs(shape: Shape, distance: float | None = None) -> tuple[list[Tensor], Tensor]:
    """Leaves target, draft, head, and labels; ``distance``: of the streams, relative, if not 0.3 or as in the file."""
    if shape.states is not None:
        target, draft, head, labels = load(shape.states, shape.rows, shape.v, distance)
    else:
        generator = torch.Generator().manual_seed(0)
        target = torch.randn(shape.rows, shape.d, generator=generator)
        draft = target + (distance or 0.3) * torch.randn(shape.rows, shape.d, generator=generator)
        head = torch.randn(shape.v, shape.d, generator=generator).mul_(shape.d**-0.5)
        labels = torch.randint(0, shape.v, (shape.rows,), generator=generator)
    return [t.to(shape.dtype).requires_grad_() for t in (target, draft, head)], labels


def eager(target: Tensor, draft: Tensor, head: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """What a training script does: logits of the model's dtype, widened for the losses."""
    z_target, z_draft = F.linear(target, head).float(), F.linear(draft, head).float()
    if softcap:
        z_target, z_draft = softcap * torch.tanh(z_target / softcap), softcap * torch.tanh(z_draft / softcap)
    log_p, log_q = z_target.detach().log_softmax(-1), z_draft.log_softmax(-1)
    return F.cross_entropy(z_target, labels) + OMEGA * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def ours(
    target: Tensor, draft: Tensor, head: Tensor, labels: Tensor, softcap: float | None, filter_eps: float | None = None
) -> Tensor:
    """The same through the one operation; with ``filter_eps`` its sparse plan."""
    pairs = torch.arange(len(draft))
    if filter_eps is None:
        return consistency_loss(target, draft, head, labels, pairs, omega=OMEGA, softcap=softcap).loss
    # named: "auto" would take the reference, which leaves nothing out, where the C++ plan cannot run
    return consistency_loss(
        target,
        draft,
        head,
        labels,
        pairs,
        omega=OMEGA,
        softcap=softcap,
        plan="sparse",
        filter_eps=filter_eps,
        impl="cpp",
    ).loss


def variants(shape: Shape) -> dict[str, Loss]:
    """Complete losses, and peers for the cross entropy of one stream: those say what a half costs elsewhere."""
    found: dict[str, Loss] = {"eager": eager, "compile": torch.compile(eager), "ours": ours}
    found |= {f"ours, sparse {eps:g}": partial(ours, filter_eps=eps) for eps in shape.filters}
    if shape.states is not None:
        return found
    if hasattr(torch.nn, "LinearCrossEntropyOptions") and not shape.softcap:
        chunked = torch.nn.LinearCrossEntropyOptions()  # chunks of rows, chosen by torch
        found["torch linear CE (CE only)"] = lambda t, d, w, y, cap: F.linear_cross_entropy(t, w, y).float()
        found["torch linear CE, chunked (CE only)"] = lambda t, d, w, y, cap: F.linear_cross_entropy(
            t, w, y, options=chunked
        ).float()
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        return found
    found["cut-cross-entropy (CE only)"] = lambda t, d, w, y, cap: linear_cross_entropy(
        t, w, y, softcap=cap, impl="torch_compile"
    )
    return found


def step(loss: Loss, leaves: list[Tensor], labels: Tensor, softcap: float | None) -> None:
    """One forward and backward; gradients are dropped first, as optimizer.zero_grad does."""
    for leaf in leaves:
        leaf.grad = None
    loss(*leaves, labels, softcap).backward()
