"""Models outside the lean decoder's families: the same text as transformers, or a refusal; never another text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from engine import RefineOptions, Refiner, UnsupportedModel
from tests.engine.checkpoints import FAMILIES, Oracle, generate, prompts, random_model, save

PROMPTS = prompts(1)
BASE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 320, "initializer_range": 0.2, "pad_token_id": 3,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WITHOUT_KV = {name: value for name, value in BASE.items() if name != "num_key_value_heads"}
GPT: dict[str, Any] = {
    "vocab_size": 101, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 320, "initializer_range": 0.2,
    "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SERVED: dict[str, dict[str, Any]] = {
    "Phi": BASE,
    "Phi3": BASE,
    "GPTNeoX": WITHOUT_KV,
    "GPT2": GPT,
    "Granite": BASE,
    "Olmo2": BASE,
    "Olmo3": BASE | {"sliding_window": 9},
    "Cohere": BASE | {"logit_scale": 1.0},
    "Gemma3Text": BASE | {"head_dim": 16, "sliding_window": 9},
    "Mixtral": BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9},
    "Starcoder2": BASE | {"sliding_window": 9},
}
REFUSED: dict[str, dict[str, Any]] = {
    # logits that are not head times backbone
    "Granite": BASE | {"logits_scaling": 4.0},
    "Cohere": BASE,
    # a sliding window that only the mask knows, and attention in chunks
    "Phimoe": BASE | {"sliding_window": 24, "num_local_experts": 4},
    # attention sinks
    "GptOss": BASE | {"head_dim": 16, "num_local_experts": 4, "sliding_window": 9},
    # attention that does not go through the interface
    "Falcon": {"vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "Bloom": {"vocab_size": 101, "hidden_size": 48, "n_layer": 2, "n_head": 4},
    # keys and values of different sizes
    "DeepseekV3": WITHOUT_KV | {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 12},
    # layers with a state of their own
    "Mamba": {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "Lfm2": BASE | {"layer_types": ["conv", "full_attention"]},
    "GraniteMoeHybrid": BASE | {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 12,
        "mamba_d_state": 8, "num_local_experts": 0, "shared_intermediate_size": 32},
}  # fmt: skip
SERVED_BY_NEWER: dict[str, dict[str, Any]] = {
    # attention that goes through the interface in newer versions of transformers only
    "GPTJ": GPT | {"rotary_dim": 8},
    "CodeGen": GPT | {"rotary_dim": 8},
}
LONGROPE = BASE | {
    "original_max_position_embeddings": 48,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 6,
        "long_factor": [2.0, 3.0, 4.0, 4.0, 5.0, 6.0], "original_max_position_embeddings": 48,
    },
}  # fmt: skip


def checkpoint(name: str, fields: dict[str, Any], folder: Path) -> Path:
    model = random_model(getattr(transformers, name + "Config")(**fields))
    model.config.eos_token_id = None
    return save(model, folder, [2])


def answers(folder: Path, texts: list[list[int]], limit: int) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return [generate(model, text, limit) for text in texts]


@pytest.mark.parametrize("name", SERVED)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    folder = checkpoint(name, SERVED[name], tmp_path)
    expected = answers(folder, PROMPTS, 24)
    for max_batch_tokens in (2048, 7):
        with Refiner.from_pretrained(folder, kv_cache_tokens=2048, max_batch_tokens=max_batch_tokens) as refiner:
            for window in ("auto", 5):
                for drafts in (expected, expected[::-1], [None] * len(PROMPTS)):
                    requests = [{"prompt_ids": p, "draft_ids": d} for p, d in zip(PROMPTS, drafts, strict=True)]
                    results = refiner.refine(requests, RefineOptions(max_new_tokens=24, window=window))
                    assert [result.token_ids for result in results] == expected
            refiner.check_integrity()


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("backend", ["auto", "hf"])
def test_what_cannot_be_served_is_refused(name: str, backend: str, tmp_path: Path) -> None:
    folder = checkpoint(name, REFUSED[name], tmp_path)
    with pytest.raises(UnsupportedModel):
        Refiner.from_pretrained(folder, kv_cache_tokens=2048, backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SERVED_BY_NEWER)
def test_refused_or_equal_to_transformers(name: str, tmp_path: Path) -> None:
    """Which of the two is the version's choice; another text is nobody's."""
    folder = checkpoint(name, SERVED_BY_NEWER[name], tmp_path)
    try:
        refiner = Refiner.from_pretrained(folder, kv_cache_tokens=2048)
    except UnsupportedModel as error:
        pytest.skip(f"refused with transformers {transformers.__version__}: {error}")
    with refiner:
        results = refiner.refine([{"prompt_ids": p} for p in PROMPTS], RefineOptions(max_new_tokens=24))
    assert [result.token_ids for result in results] == answers(folder, PROMPTS, 24)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lean_families_through_transformers_modules(
    name: str, oracle: Callable[[str], Oracle], load: Callable[..., Refiner]
) -> None:
    results = load(name, backend="hf").refine([{"prompt_ids": p} for p in PROMPTS], RefineOptions(max_new_tokens=20))
    assert [result.token_ids for result in results] == [oracle(name).greedy(p, 20) for p in PROMPTS]


def test_rotations_that_change_with_the_length_end_where_they_change(tmp_path: Path) -> None:
    """Phi-3's long variant: behind the original length every position is rotated differently, also that of others."""
    folder = checkpoint("Phi3", LONGROPE, tmp_path)
    texts = [text[:30] for text in PROMPTS]
    requests = [{"prompt_ids": text} for text in [*texts, PROMPTS[4]]]
    with Refiner.from_pretrained(folder, kv_cache_tokens=2048) as refiner:
        *results, long = refiner.refine(requests, RefineOptions(max_new_tokens=18))
    assert [result.token_ids for result in results] == answers(folder, texts, 18)
    assert "48 positions" in str(long.error)


def test_lean_does_not_fall_back(tmp_path: Path) -> None:
    folder = checkpoint("Phi3", BASE, tmp_path)
    with pytest.raises(UnsupportedModel, match="phi3"):
        Refiner.from_pretrained(folder, backend="lean")
