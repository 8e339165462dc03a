"""Tiny random checkpoints whose greedy text varies, and what transformers itself answers with them: the oracle."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

VOCABULARY = 101
PAD = 3
LONGEST = 48
"""Longest answer that an oracle computes."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 320, "initializer_range": 0.3, "bos_token_id": 1,
    "pad_token_id": PAD, "eos_token_id": 2,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 20}),
    "llama-llama3-rope": (LlamaConfig, {"rope_parameters": _LLAMA3, "num_key_value_heads": 1}),
    "mistral-window": (MistralConfig, {"sliding_window": 13, "head_dim": 16}),
    "mistral-tied": (MistralConfig, {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2-some-windows": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}),
    "qwen2-tied": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 24, "attention_bias": True}),
    "qwen3-tied": (Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": (
        Gemma2Config,
        {"head_dim": 16, "sliding_window": 11, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0,
         "query_pre_attn_scalar": 24},
    ),
    "gemma2-untied": (
        Gemma2Config,
        {"head_dim": 12, "sliding_window": 40, "attention_bias": True, "tie_word_embeddings": False,
         "query_pre_attn_scalar": 12},
    ),
}  # fmt: skip


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A float32 model of random weights; norms and biases, which transformers starts at constants, are random too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                spread = 0.5 if name.endswith("bias") else 0.2
                parameter.add_(torch.randn_like(parameter) * spread)
        if config.tie_word_embeddings:  # or every token is most similar to itself and is repeated for ever
            model.get_input_embeddings().weight.mul_(0.15)
    return model


def prompts(seed: int, count: int = 6) -> list[list[int]]:
    """Random prompts of 1 to 100 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, 2, 33, 7, 100, 32, 64, 50][:count]
    return [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def save(model: PreTrainedModel, folder: Path, eos: int | list[int] | None = None, **options: Any) -> Path:
    """Saves model and generation config as a checkpoint folder."""
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=PAD)
    model.save_pretrained(folder, **options)
    return folder


@dataclass
class Oracle:
    """A checkpoint folder beside the transformers model of the same weights, whose answers are computed once."""

    folder: Path
    model: PreTrainedModel
    eos: frozenset[int]
    _greedy: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def greedy(self, prompt: list[int], limit: int = LONGEST) -> list[int]:
        """What ``generate`` answers: greedy, ended by EOS or after ``limit`` tokens."""
        key = tuple(prompt)
        if key not in self._greedy:
            self._greedy[key] = generate(self.model, prompt, LONGEST)
        return self._greedy[key][:limit]

    @torch.no_grad()
    def logits(self, token_ids: list[int]) -> Tensor:
        """[tokens, vocabulary] of one plain forward pass."""
        logits: Tensor = self.model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
        return logits

    def ends_with_eos(self, answer: list[int]) -> bool:
        return bool(answer) and answer[-1] in self.eos


@torch.no_grad()
def generate(model: PreTrainedModel, prompt: list[int], limit: int) -> list[int]:
    """Greedy text of transformers behind ``prompt``, EOS included."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit)
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer


def choose_eos(model: PreTrainedModel, texts: list[list[int]]) -> list[int]:
    """Three token ids, of which two end some of the model's greedy texts somewhere in the middle."""
    firsts: dict[int, int] = {}
    for text in texts:
        for place, token in enumerate(text):
            if place >= 5 and token not in text[:place]:
                firsts.setdefault(token, place)
    late = sorted(firsts, key=lambda token: (abs(firsts[token] - 20), token))
    return sorted({2, *late[:2]})


def family_model(name: str, seed: int = 0) -> PreTrainedModel:
    """The random model of one of FAMILIES."""
    cls, changes = FAMILIES[name]
    return random_model(
        cls(**{**_COMMON, **changes}), seed + int.from_bytes(hashlib.sha256(name.encode()).digest()[:2])
    )


def build(name: str, folder: Path, seed: int = 0) -> Oracle:
    """The oracle of one of FAMILIES."""
    model = family_model(name, seed)
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=PAD)
    model.config.eos_token_id = None
    texts = [generate(model, prompt, 40) for prompt in prompts(0)[:4]]
    model.config.eos_token_id = 2  # generation_config.json is the one in force
    eos = choose_eos(model, texts)
    save(model, folder, eos)
    return Oracle(folder, model, frozenset(eos))


def edit_config(folder: Path, **changes: Any) -> Path:
    """Changes fields of config.json; None removes one."""
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    for name, value in changes.items():
        fields.pop(name, None)
        if value is not None:
            fields[name] = value
    file.write_text(json.dumps(fields))
    return folder
