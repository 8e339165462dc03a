"""Models of well-known shapes with random weights, made on the device: no file and no network."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from engine.jacobi import Vocabulary
from engine.model import Decoder
from engine.refiner import Refiner

_GEMMA: dict[str, Any] = {"vocab_size": 256000, "head_dim": 256, "query_pre_attn_scalar": 256}


def configuration(name: str) -> PreTrainedConfig:
    """The published shape of a model, or a tiny one of its kind (``tiny``)."""
    if name == "gemma-2-2b":
        return Gemma2Config(
            **_GEMMA, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
            num_key_value_heads=4,
        )  # fmt: skip
    if name == "gemma-2-9b":
        return Gemma2Config(
            **_GEMMA, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
            num_key_value_heads=8,
        )  # fmt: skip
    if name == "llama-3-8b":
        return LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0,
        )  # fmt: skip
    if name == "tiny":
        return Gemma2Config(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=64, max_position_embeddings=2048,
        )  # fmt: skip
    raise ValueError(f"no shape is known as {name!r}")


@dataclass(slots=True)
class Pair:
    """The same weights in transformers and in the engine."""

    theirs: PreTrainedModel
    model: Decoder
    refiner: Refiner

    @property
    def parameters(self) -> int:
        return multiplied_weights(self.theirs)


def multiplied_weights(model: PreTrainedModel) -> int:
    """Elements of the matrices that a forward pass reads whole; of an embedding that is not the head's too, it reads rows."""
    matrices = {id(p): p.numel() for p in model.parameters() if p.ndim == 2}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is not head:
        del matrices[id(embedding)]
    return sum(matrices.values())


def pair(name: str, device: torch.device, batch: int, length: int) -> Pair:
    """``batch`` sequences of up to ``length`` positions will fit."""
    config = configuration(name)
    # random text must not end early, on either side
    config.eos_token_id, config.pad_token_id, config.bos_token_id = None, 0, 1
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    # transformers refuses sdpa where attention scores are capped
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    with device:
        theirs = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()
    model = Decoder.from_tensors(config, theirs.state_dict(), dtype, device)
    vocabulary = Vocabulary(config.vocab_size, frozenset(), 0)
    tokens = batch * (length + 64)
    refiner = Refiner(model, vocabulary, max_batch_tokens=2048, kv_cache_tokens=tokens, max_batch_size=batch)
    return Pair(theirs, model, refiner)
