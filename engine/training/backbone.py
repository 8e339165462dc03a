"""The parts of a transformers causal LM that the loss needs, wherever wrappers have put them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from engine.errors import UnsupportedModel

# What some models do to their logits or add to their loss; fields of these values leave both alone.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "lm_head_multiplier": (None, 1),
    "output_router_logits": (None, False),
}


@dataclass(frozen=True, slots=True)
class Head:
    """logits = softcap * tanh(z / softcap) with z = hidden @ weight.T + bias."""

    weight: Tensor
    """[V, D]."""
    bias: Tensor | None
    """[V]."""
    softcap: float | None


@dataclass(frozen=True, slots=True)
class CausalLM:
    """A model without its wrappers, and its decoder."""

    model: Any
    decoder: Any
    config: PreTrainedConfig

    @classmethod
    def of(cls, model: nn.Module) -> "CausalLM":
        """Finds both; raises ``UnsupportedModel`` for what is known to need more than hidden states and a head."""
        inner = unwrap(model)
        if not hasattr(inner, "get_decoder") or getattr(inner, "get_output_embeddings", lambda: None)() is None:
            raise UnsupportedModel(
                f"train_step needs a causal language model of transformers, got {type(model).__name__}; "
                "load it with AutoModelForCausalLM"
            )
        config = inner.config.get_text_config()
        for name, neutral in _NEUTRAL.items():
            if (value := getattr(config, name, None)) not in neutral:
                raise UnsupportedModel(
                    f"the config field {name!r} is {value!r}, which train_step does not honour; it needs {neutral[-1]!r}"
                )
        return cls(inner, inner.get_decoder(), config)

    def hidden_states(self, **inputs: Any) -> Tensor:
        """[B, L, D] behind the last norm; ``inputs`` are the decoder's."""
        hidden: Tensor = self.decoder(**inputs, use_cache=False, return_dict=True).last_hidden_state
        return hidden

    def head(self) -> Head:
        """The projection to logits; differentiable in what is trained of it."""
        weight, bias = _weights(self.model.get_output_embeddings())
        return Head(weight, bias, getattr(self.config, "final_logit_softcapping", None) or None)

    def call_inside(self, outer: nn.Module, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """``compute()`` in place of the model's forward, within that of its wrappers.

        Their hooks gather sharded parameters, attach adapters and reduce gradients, and see the loss among the results.
        """
        own = self.model.__dict__.get("forward")
        self.model.forward = lambda *_args, **_kwargs: compute()
        try:
            results: tuple[Tensor, ...] = outer()
        finally:
            del self.model.forward
            if own is not None:
                self.model.forward = own
        return results


def unwrap(model: Any) -> Any:
    """The model inside DistributedDataParallel and peft."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            raise UnsupportedModel(
                "the model is wrapped by torch.compile, which would compile this step anew at every call; "
                "compile its decoder in place instead: model.get_decoder().compile()"
            )
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            if any(getattr(peft, "is_prompt_learning", False) for peft in model.peft_config.values()):
                raise UnsupportedModel(
                    "the peft adapter adds virtual tokens to the input, which the layout of a row does not have; "
                    "use one that changes weights, such as LoRA"
                )
            model = model.get_base_model()
        else:
            return model


def _weights(head: Any) -> tuple[Tensor, Tensor | None]:
    if hasattr(head, "modules_to_save"):  # peft: trained in full, beside the original
        name = head.active_adapters[0]
        return _weights(head.original_module if head.disable_adapters else head.modules_to_save[name])
    if hasattr(head, "lora_A") and hasattr(head, "base_layer"):
        return _lora_weights(head)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise UnsupportedModel(
            f"train_step needs an nn.Linear as the head, got {type(head).__name__}; leave the head out of quantisation "
            "and of adapters other than LoRA"
        )
    if hasattr(head.weight, "placements"):
        raise UnsupportedModel(
            "the head's weight is a DTensor inside the model's forward: the head is sharded by itself, and its own forward, "
            "which would gather it, does not run; leave it to the fully_shard of the whole model, and out of tensor parallelism"
        )
    return head.weight, head.bias


def _lora_weights(head: Any) -> tuple[Tensor, Tensor | None]:
    weight, bias = _weights(head.base_layer)
    if head.disable_adapters or head.merged:
        return weight, bias
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        dropout = getattr(head.lora_dropout[name], "p", 0.0) if head.training else 0.0
        if dropout or getattr(head, "lora_variant", {}).get(name) or head.lora_B[name].bias is not None:
            raise UnsupportedModel(
                "the LoRA adapter of the head has dropout, a bias or a variant such as DoRA, got adapter "
                f"{name!r}; use plain LoRA there, or train the head in full (modules_to_save)"
            )
        weight = weight + head.get_delta_weight(name).to(weight.dtype)
    return weight, bias


def autocast_dtype(device: torch.device, otherwise: torch.dtype) -> torch.dtype:
    """The dtype in which attention scores are computed."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return otherwise
