"""The consistency loss as a module that holds its options."""

from torch import Tensor, nn

from engine.kernels.consistency_loss.operation import (
    ConsistencyLossOutput,
    LossImpl,
    Normalization,
    Plan,
    consistency_loss,
)


class ConsistencyLoss(nn.Module):
    """``consistency_loss`` with its options fixed; it owns no parameters, the head's weight is an argument."""

    def __init__(
        self,
        *,
        omega: float | Tensor = 1e3,
        softcap: float | None = None,
        temperature: float = 1.0,
        ignore_index: int = -100,
        kl_normalization: Normalization = "token",
        plan: Plan = "auto",
        filter_eps: float = 0.0,
        impl: LossImpl = "auto",
        return_stats: bool = False,
    ) -> None:
        """The options are those of ``consistency_loss``."""
        super().__init__()
        self.omega = omega
        self.softcap, self.temperature, self.ignore_index = softcap, temperature, ignore_index
        self.kl_normalization, self.plan, self.filter_eps = kl_normalization, plan, filter_eps
        self.impl, self.return_stats = impl, return_stats

    def forward(
        self,
        target_hidden: Tensor,
        draft_hidden: Tensor,
        lm_head_weight: Tensor,
        labels: Tensor,
        pair_index: Tensor,
        *,
        bias: Tensor | None = None,
        label_weights: Tensor | None = None,
        pair_weights: Tensor | None = None,
        ar_denominator: float | Tensor | None = None,
        consistency_denominator: float | Tensor | None = None,
    ) -> ConsistencyLossOutput:
        """The tensors are those of ``consistency_loss``."""
        return consistency_loss(
            target_hidden, draft_hidden, lm_head_weight, labels, pair_index,
            omega=self.omega, bias=bias, softcap=self.softcap, temperature=self.temperature,
            ignore_index=self.ignore_index, label_weights=label_weights, pair_weights=pair_weights,
            ar_denominator=ar_denominator, consistency_denominator=consistency_denominator,
            kl_normalization=self.kl_normalization, plan=self.plan, filter_eps=self.filter_eps, impl=self.impl,
            return_stats=self.return_stats,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The options that were set, for print(module)."""
        return f"omega={self.omega}, softcap={self.softcap}, temperature={self.temperature}, impl={self.impl!r}"
