"""Which keys a token sees in a packed row, in the form that each attention of transformers takes.

A key is visible if it belongs to the same trajectory, to its prompt or to the same response, and its position is not
behind the query's. A sliding window counts positions, not places in the row, as it would in a row of x and one response.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedConfig

from engine.errors import UnsupportedModel
from engine.training.collator import TrainBatch
from engine.training.layout import PROMPT

Mask: TypeAlias = Tensor | BlockMask
IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")


def attention_masks(config: PreTrainedConfig, batch: TrainBatch, dtype: torch.dtype) -> Mask | dict[str, Mask]:
    """The ``attention_mask`` argument of a transformers decoder of this config; what lies behind the caps is the model's.

    One mask, or for layers of several kinds a dict of one per kind, which transformers (5.17 and later) passes on as
    they are: "sdpa" boolean [B, 1, L, L], True where visible; "eager" the same as summands of ``dtype``, 0 or its lowest
    value; "flex_attention" a BlockMask. Raises ``UnsupportedModel`` for another attention or kind of layer.
    """
    implementation = config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedModel(
            f"the model's attn_implementation is {implementation!r}, whose attention takes no mask of blocks; "
            f"call model.set_attn_implementation with one of {', '.join(map(repr, IMPLEMENTATIONS))}"
        )
    make = _block_mask if implementation == "flex_attention" else _dense_mask
    masks = {
        kind: make(batch, window, None if implementation == "sdpa" else dtype)
        for kind, window in layer_windows(config).items()
    }
    return masks if len(masks) > 1 else next(iter(masks.values()))


def layer_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """The sliding window of every kind of layer, None for the whole context."""
    window = getattr(config, "sliding_window", None)
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if not kinds:
        return {"sliding_attention" if window else "full_attention": window or None}
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(
            f"the model has layers of type {', '.join(sorted(unknown))}, which cannot be given a mask of blocks; "
            "train_step needs layers of full_attention and sliding_attention"
        )
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def visible(batch: TrainBatch, window: int | None = None) -> Tensor:
    """Boolean [B, L, L], queries first. Padding sees itself, or its softmax would be of nothing."""
    trajectory, response, position = batch["trajectory_ids"], batch["response_ids"], batch["position_ids"]
    distance = position[:, :, None] - position[:, None, :]
    seen = (trajectory[:, :, None] == trajectory[:, None, :]) & (trajectory[:, None, :] >= 0)
    seen &= (response[:, None, :] == PROMPT) | (response[:, :, None] == response[:, None, :])
    seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    return seen | torch.eye(position.shape[1], dtype=torch.bool, device=position.device)


def _dense_mask(batch: TrainBatch, window: int | None, dtype: torch.dtype | None) -> Tensor:
    seen = visible(batch, window)[:, None]
    if dtype is None:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _block_mask(batch: TrainBatch, window: int | None, _: torch.dtype | None) -> BlockMask:
    rows, length = batch["input_ids"].shape
    device = batch["input_ids"].device
    rule = mask_rule(batch, window)
    return create_block_mask(rule, rows, None, length, length, device=device)


def mask_rule(batch: TrainBatch, window: int | None = None) -> Callable[[Any, Any, Any, Any], Tensor]:
    """``visible`` as a ``mask_mod`` of flex_attention."""
    trajectory, response, position = batch["trajectory_ids"], batch["response_ids"], batch["position_ids"]

    def rule(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = position[b, q] - position[b, k]
        seen = (trajectory[b, q] == trajectory[b, k]) & (trajectory[b, k] >= 0) & (distance >= 0)
        seen = seen & ((response[b, k] == PROMPT) | (response[b, q] == response[b, k]))
        if window is not None:
            seen = seen & (distance < window)
        return seen | (q == k)

    return rule
