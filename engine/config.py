"""From a Hugging Face model configuration to the few numbers the lean decoder runs on. A field whose value the decoder
would not honour raises UnsupportedModel and is named: nothing is silently ignored."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from engine.errors import UnsupportedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")

# Describe the checkpoint, its training or transformers' own behaviour; they have no part in the forward pass.
_NO_EFFECT = frozenset(
    "_name_or_path architectures chunk_size_feed_forward dtype torch_dtype id2label label2id is_encoder_decoder model_type "
    "output_attentions output_hidden_states problem_type return_dict transformers_version initializer_range use_cache "
    "attention_dropout bos_token_id eos_token_id pad_token_id cache_implementation _attn_implementation "
    "attn_implementation is_llama_config rope_theta unsloth_version max_window_layers use_sliding_window "
    "_model_name_or_path unk_token_id".split()  # the last two: what transformers makes of a GGUF file
)
_COMMON = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters".split()
)
_BY_FAMILY = {
    "llama": "hidden_act attention_bias mlp_bias pretraining_tp rope_scaling",
    "mistral": "hidden_act sliding_window",
    "qwen2": "hidden_act sliding_window layer_types",
    "qwen3": "hidden_act sliding_window layer_types attention_bias",
    "gemma2": "hidden_activation hidden_act attention_bias query_pre_attn_scalar sliding_window layer_types "
    "final_logit_softcapping attn_logit_softcapping use_bidirectional_attention",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What the lean decoder computes; see ``engine.model.Decoder``."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    eps: float
    activation: Literal["silu", "gelu_tanh"]
    inv_freq: Tensor
    """[head_dim / 2] float32 rotary frequencies, after scaling."""
    attention_scale: float
    layer_windows: tuple[int, ...]
    """Sliding window of each layer; 0: full attention."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    @property
    def is_gemma(self) -> bool:
        """Gemma-2's conventions: norms weighted by 1 + w, norms behind both blocks, scaled embeddings."""
        return self.family == "gemma2"

    @property
    def has_qk_norm(self) -> bool:
        return self.family == "qwen3"

    @property
    def embedding_scale(self) -> float:
        return math.sqrt(self.hidden_size) if self.is_gemma else 1.0


def model_spec(config: PreTrainedConfig) -> ModelSpec:
    """The lean decoder's view of ``config``; raises UnsupportedModel naming the first thing it would not honour."""
    family = config.model_type
    if family not in FAMILIES:
        raise UnsupportedModel(f"model_type {family!r} is not one of {list(FAMILIES)}; load it with backend='hf'")
    fields = config.to_dict()
    _refuse_unknown_fields(family, fields)
    head_dim = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    scale_base = fields["query_pre_attn_scalar"] if family == "gemma2" else head_dim
    return ModelSpec(
        family=family,
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        layers=fields["num_hidden_layers"],
        heads=fields["num_attention_heads"],
        kv_heads=fields.get("num_key_value_heads") or fields["num_attention_heads"],
        head_dim=head_dim,
        max_positions=fields["max_position_embeddings"],
        eps=fields["rms_norm_eps"],
        activation=_activation(family, fields),
        inv_freq=rotary_frequencies(fields["rope_parameters"], head_dim),
        attention_scale=scale_base**-0.5,
        layer_windows=_layer_windows(family, fields),
        attention_softcap=fields.get("attn_logit_softcapping"),
        logit_softcap=fields.get("final_logit_softcapping"),
        tied=bool(fields["tie_word_embeddings"]),
        qkv_bias=family == "qwen2" or bool(fields.get("attention_bias")),
        output_bias=bool(fields.get("attention_bias")),
        mlp_bias=bool(fields.get("mlp_bias")),
    )


def _refuse_unknown_fields(family: str, fields: dict[str, Any]) -> None:
    honoured = _NO_EFFECT | _COMMON | set(_BY_FAMILY[family].split())
    for name, value in fields.items():
        if name not in honoured and value is not None:
            raise UnsupportedModel(
                f"config field {name!r} = {value!r:.100} is not honoured by the lean {family} decoder; remove it if it has no "
                "effect, or load the model with backend='hf'"
            )
    for name, neutral in (("pretraining_tp", 1), ("use_bidirectional_attention", False), ("rope_scaling", None)):
        if fields.get(name) not in (None, neutral):
            raise UnsupportedModel(
                f"config field {name!r} = {fields[name]!r} is not supported, only {neutral!r}; load the model with backend='hf'"
            )


def _activation(family: str, fields: dict[str, Any]) -> Literal["silu", "gelu_tanh"]:
    # Gemma's configurations carry both names; hidden_activation is the one in force
    name = "hidden_activation" if family == "gemma2" else "hidden_act"
    kind = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}.get(fields[name])
    if kind == "silu":
        return "silu"
    if kind == "gelu_tanh":
        return "gelu_tanh"
    raise UnsupportedModel(
        f"config field {name!r} = {fields[name]!r} is not supported, only silu and gelu_pytorch_tanh"
    )


def _layer_windows(family: str, fields: dict[str, Any]) -> tuple[int, ...]:
    layers, window = fields["num_hidden_layers"], fields.get("sliding_window")
    types = fields.get("layer_types")
    if types is None:
        return (window or 0 if family == "mistral" else 0,) * layers
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown or len(types) != layers:
        raise UnsupportedModel(
            f"config field 'layer_types' must name full_attention or sliding_attention for each of {layers} layers, got {types}"
        )
    if window is None and "sliding_attention" in types:
        raise UnsupportedModel("config field 'layer_types' asks for sliding_attention but 'sliding_window' is not set")
    return tuple(int(window or 0) if kind == "sliding_attention" else 0 for kind in types)


def rotary_frequencies(parameters: dict[str, Any], head_dim: int) -> Tensor:
    """[head_dim / 2] float32 rotary frequencies for the rope types default, linear and llama3 (Llama 3.1's by-wavelength
    scaling); raises UnsupportedModel for others."""
    known = {"rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"}
    known |= {"original_max_position_embeddings", "partial_rotary_factor"}
    kind = parameters.get("rope_type", "default")
    extra = sorted(name for name, value in parameters.items() if name not in known and value is not None)
    if kind not in ("default", "linear", "llama3") or extra or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel(
            f"config field 'rope_parameters' = {parameters} is not honoured: rope types default, linear and llama3 over the "
            "whole head are; load the model with backend='hf'"
        )
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    inv_freq = 1.0 / (parameters["rope_theta"] ** exponent)
    if kind == "linear":
        return inv_freq / parameters["factor"]
    if kind == "llama3":
        return _llama3_frequencies(inv_freq, parameters)
    return inv_freq


def _llama3_frequencies(inv_freq: Tensor, parameters: dict[str, Any]) -> Tensor:
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    original, factor = parameters["original_max_position_embeddings"], parameters["factor"]
    wavelength = 2 * math.pi / inv_freq
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, blended)
    return torch.where(wavelength < original / high, inv_freq, scaled)
