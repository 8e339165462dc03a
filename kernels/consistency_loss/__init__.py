"""Cross entropy + omega * forward KL over a vocabulary, with its gradients, as one operation (arXiv 2503.04240)."""

from engine.kernels.consistency_loss.module import ConsistencyLoss
from engine.kernels.consistency_loss.operation import ConsistencyLossOutput, consistency_loss
from engine.kernels.consistency_loss.problem import LossStats

__all__ = ["ConsistencyLoss", "ConsistencyLossOutput", "LossStats", "consistency_loss"]
