"""The training loss of a batch: one pass of the backbone, then head and loss as one operation."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.errors import UnsupportedModel
from engine.kernels import consistency_loss
from engine.kernels.consistency_loss import LossStats
from engine.kernels.consistency_loss.operation import LossImpl, Normalization, Plan
from engine.training.backbone import CausalLM, autocast_dtype
from engine.training.collator import TrainBatch
from engine.training.masks import attention_masks


@dataclass(frozen=True, slots=True)
class TrainStepOutput:
    """What ``train_step`` returns; only ``loss`` carries a gradient."""

    loss: Tensor
    """ar + omega * consistency, a float32 scalar (float64 for a float64 model)."""
    ar: Tensor
    """Mean cross entropy of the target's tokens, in nats."""
    consistency: Tensor
    """Mean divergence of the draft positions, in nats, without omega."""
    label_count: Tensor
    """How many tokens ``ar`` is about."""
    pair_count: Tensor
    """How many draft positions ``consistency`` is about."""
    stats: LossStats | None
    """With ``return_stats=True``: of the batch's target rows, then its draft rows."""


def train_step(
    model: nn.Module,
    batch: TrainBatch,
    *,
    omega: float | Tensor = 1e3,
    kl_normalization: Normalization = "token",
    temperature: float = 1.0,
    ar_denominator: float | Tensor | None = None,
    consistency_denominator: float | Tensor | None = None,
    loss_impl: LossImpl = "auto",
    plan: Plan = "auto",
    filter_eps: float = 0.0,
    return_stats: bool = False,
) -> TrainStepOutput:
    """L_AR + omega * L_Con of a batch (arXiv 2503.04240, with the layout of ``engine.training.layout``); no backward.

    ``model`` is a causal LM of transformers, plain or inside peft, DistributedDataParallel or fully_shard, with an
    attn_implementation of "sdpa", "eager" or "flex_attention" (on a GPU: flex_attention takes no gradient on a CPU);
    ``batch`` comes from ``TrajectoryCollator`` and lies on the model's device. The result equals that of separate
    forward passes of [x | y(T)] and every [x | y(t)]; with dropout, these share what the prompt's tokens drew.

    The terms are means over the batch's own tokens. To accumulate gradients over micro-batches pass the sums of their
    ``label_count`` and ``pair_count`` as ``ar_denominator`` and ``consistency_denominator``: the losses and gradients then
    add up to those of the whole batch. Wrappers that average gradients over processes want these sums over all of them,
    divided by their number. The other options are those of ``consistency_loss``.

    Precision is the model's own, or that of a ``torch.autocast`` around this call; the loss is in float32. The model's
    own forward does not run, so that autocast which accelerate wraps around it must be entered here (its ``autocast()``)
    and losses it would add are not there. To compile, compile the decoder in place: ``model.get_decoder().compile()``.

    Raises ``UnsupportedModel`` where the model needs more than hidden states and a linear head, ValueError for a batch on
    another device or a wrong option; ``verify_model`` compares an unknown model's logits with its own forward.
    """
    causal_lm = CausalLM.of(model)
    device = batch["input_ids"].device
    at = causal_lm.model.get_input_embeddings().weight.device
    if device != at:
        raise ValueError(f"the batch is on {device}, the model's embeddings on {at}; move the batch there")

    def compute() -> tuple[Tensor, ...]:
        hidden, head = hidden_rows(causal_lm, batch), causal_lm.head()
        out = consistency_loss(
            hidden[batch["target_rows"]], hidden[batch["draft_rows"]], head.weight, batch["labels"], batch["pair_index"],
            omega=omega, bias=head.bias, softcap=head.softcap, temperature=temperature, ar_denominator=ar_denominator,
            consistency_denominator=consistency_denominator, kl_normalization=kl_normalization, plan=plan,
            filter_eps=filter_eps, impl=loss_impl, return_stats=return_stats,
        )  # fmt: skip
        stats = out.stats
        return out.loss, out.ar, out.consistency, *((stats.lse, stats.entropy, stats.argmax_agrees) if stats else ())

    loss, ar, consistency, *rest = causal_lm.call_inside(model, compute)
    stats = LossStats(*rest) if rest else None
    return TrainStepOutput(loss, ar, consistency, batch["label_count"], batch["pair_count"], stats)


def hidden_rows(causal_lm: CausalLM, batch: TrainBatch) -> Tensor:
    """[B * L, D]: the decoder's last hidden states of a batch."""
    embeddings = causal_lm.model.get_input_embeddings().weight
    dtype = autocast_dtype(embeddings.device, embeddings.dtype)
    masks = attention_masks(causal_lm.decoder.config, batch, dtype)
    try:
        hidden = causal_lm.hidden_states(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=masks
        )
    except (TypeError, AttributeError) as error:
        raise UnsupportedModel(
            f"{type(causal_lm.model).__name__} does not take masks of blocks and position ids "
            f"({type(error).__name__}: {error}); it cannot be trained in this layout"
        ) from error
    return torch.flatten(hidden, 0, 1)
