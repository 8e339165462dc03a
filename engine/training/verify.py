"""A check, before training, that a model computes in a packed row what its own forward computes."""

import torch
from torch import nn
from transformers import PreTrainedConfig

from engine.errors import UnsupportedModel
from engine.training.backbone import CausalLM
from engine.training.collator import TrainBatch, collate
from engine.training.layout import lay_out
from engine.training.step import hidden_rows

_PROMPT, _RESPONSE = 5, 7
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@torch.no_grad()
def verify_model(model: nn.Module) -> None:
    """Raises ``UnsupportedModel`` unless the logits of ``train_step``'s layout are those of the model's own forward.

    Some twenty tokens: two responses to a prompt, packed in one row behind another trajectory, against one row of
    prompt and response each. For a model whose family the engine has not been tested with, once before training. It
    leaves the model in the mode it was in; it is not for models that are sharded over processes.
    """
    causal_lm = CausalLM.of(model)
    was_training = causal_lm.model.training
    causal_lm.model.eval()
    try:
        difference = _difference(causal_lm)
    finally:
        causal_lm.model.train(was_training)
    dtype = causal_lm.head().weight.dtype
    if not difference <= _TOLERANCE[dtype]:
        raise UnsupportedModel(
            f"{type(causal_lm.model).__name__} computes other logits in a packed row than in its own forward, by "
            f"{difference:.1e} relative (at most {_TOLERANCE[dtype]:.0e} expected in {dtype}): something in its attention, "
            "its positions or behind its head is not honoured, and train_step would train something else"
        )


def _difference(causal_lm: CausalLM) -> float:
    batch, alone = _inputs(causal_lm.config)
    device = causal_lm.model.get_input_embeddings().weight.device
    packed = {name: tensor.to(device) for name, tensor in batch.items()}  # type: ignore[attr-defined]
    hidden, head = hidden_rows(causal_lm, packed), causal_lm.head()  # type: ignore[arg-type]
    z = nn.functional.linear(hidden[-2 * _RESPONSE :], head.weight, head.bias).float()
    if head.softcap:
        z = head.softcap * torch.tanh(z / head.softcap)
    expected = causal_lm.model(input_ids=alone.to(device), use_cache=False).logits[:, _PROMPT:].float().flatten(0, 1)
    return float((z - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


def _inputs(config: PreTrainedConfig) -> tuple[TrainBatch, torch.Tensor]:
    """The packed batch, whose last tokens are the two responses, and [2, tokens] of prompt and response each."""
    token = [(i * 7919 + 3) % config.vocab_size for i in range(4 * _RESPONSE)]
    prompt, one, other = token[:_PROMPT], token[_PROMPT : _PROMPT + _RESPONSE], token[-_RESPONSE:]
    first = lay_out(other, one, [], pad_id=0)
    both = lay_out(prompt, one, [other], pad_id=0)
    return collate([[first, both]], pad_id=0), torch.tensor([prompt + one, prompt + other])
