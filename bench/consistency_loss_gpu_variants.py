"""What the consistency loss on a GPU is compared with: a function from inputs to gradients each."""

from collections.abc import Callable

import torch

from bench.consistency_loss_inputs import OMEGA, Inputs, plain_loss
from engine.kernels.consistency_loss import consistency_loss

SPARSE_EPS = 0.1
OURS = ("triton dense", "triton recompute", "triton sparse")
Variant = Callable[[Inputs], None]


def ours(plan: str, eps: float = 0.0) -> Variant:
    def run(x: Inputs) -> None:
        out = consistency_loss(
            x.target,
            x.draft,
            x.weight,
            x.labels,
            x.pairs,
            omega=OMEGA,
            softcap=x.softcap,
            plan=plan,
            filter_eps=eps,
            impl="triton",
        )  # type: ignore[call-overload,unused-ignore]
        out.loss.backward()

    return run


def eager(x: Inputs) -> None:
    plain_loss(x.target, x.draft, x.weight, x.labels, x.pairs, x.softcap).backward()


def compiled() -> Variant:
    loss = torch.compile(plain_loss)

    def run(x: Inputs) -> None:
        loss(x.target, x.draft, x.weight, x.labels, x.pairs, x.softcap).backward()

    return run


def liger() -> Variant:
    """Fused linear cross entropy, and fused linear JSD at beta 0, which is the forward KL; the latter has no soft-cap."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    def run(x: Inputs) -> None:
        first = (x.target, x.weight, x.labels, None, None, -100, 0.0, 0.0, "mean", x.softcap)
        ce = LigerFusedLinearCrossEntropyFunction.apply(*first)
        ce = ce[0] if isinstance(ce, tuple) else ce
        teacher, weight = x.target.detach(), x.weight.detach()
        kl = LigerFusedLinearJSDFunction.apply(x.draft, x.weight, teacher, weight, None, 0.0, -100, 1.0)
        (ce + OMEGA * kl).backward()

    return run


def cut_cross_entropy() -> Variant:
    """The cross entropy alone."""
    from cut_cross_entropy import linear_cross_entropy

    def run(x: Inputs) -> None:
        linear_cross_entropy(x.target, x.weight, x.labels, softcap=x.softcap, impl="cce").backward()

    return run


def products(x: Inputs) -> None:
    """Six units: what any exact implementation multiplies, at the size that suits the library best."""
    with torch.no_grad():
        for hidden in (x.target, x.draft):
            z = hidden @ x.weight.T
            x.weight.grad, hidden.grad = z.T @ hidden, z @ x.weight


BUILDERS: dict[str, Callable[[], Variant]] = {
    "six products": lambda: products,
    "triton dense": lambda: ours("dense"),
    "triton recompute": lambda: ours("recompute"),
    "triton sparse": lambda: ours("sparse", SPARSE_EPS),
    "eager": lambda: eager,
    "torch.compile": compiled,
    "liger": liger,
    "cut-cross-entropy (CE only)": cut_cross_entropy,
}
