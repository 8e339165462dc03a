"""Checkpoints to measure on."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def random_llama_135m(folder: Path) -> Path:
    """A random Llama of SmolLM-135M's shape (30 layers, hidden 576, vocabulary 49152, tied), written once to ``folder``."""
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=0,
            pad_token_id=2,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
