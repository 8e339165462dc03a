"""Every field of a configuration is honoured or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine import RefineOptions, Refiner, UnsupportedModel
from engine.config import model_spec
from tests.engine.checkpoints import FAMILIES, Oracle, edit_config, generate, prompts

PROMPTS = prompts(1)
ONE_OF_EACH = {
    "llama": "llama",
    "mistral": "mistral-window",
    "qwen2": "qwen2-some-windows",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
REFUSED: list[tuple[str, Any, str]] = [
    ("surprise", 1, "surprise"),
    ("surprise", False, "surprise"),
    ("surprise", {"a": 1}, "surprise"),
    ("quantization_config", {"quant_method": "fp8"}, "quantization_config"),
    ("attention_chunk_size", 128, "attention_chunk_size"),
    ("logits_scaling", 4.0, "logits_scaling"),
    ("num_experts", 4, "num_experts"),
    ("partial_rotary_factor", 0.5, "rope_parameters|partial_rotary_factor"),
    ("rope_parameters", YARN, "rope_parameters.*yarn"),
    ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "rope_parameters.*dynamic"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "surprise": 2.0}, "rope_parameters.*surprise"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, "rope_parameters"),
]


def same_text(folder: Path, limit: int = 20) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with Refiner.from_pretrained(folder, backend="lean", kv_cache_tokens=2048) as refiner:
        results = refiner.refine([{"prompt_ids": p} for p in PROMPTS], RefineOptions(max_new_tokens=limit))
    assert [result.token_ids for result in results] == [generate(model, p, limit) for p in PROMPTS]


@pytest.mark.parametrize("family", ONE_OF_EACH)
@pytest.mark.parametrize(("field", "value", "named"), REFUSED, ids=[f"{f}-{i}" for i, (f, _, _) in enumerate(REFUSED)])
def test_a_field_that_is_not_honoured_is_named(
    family: str, field: str, value: Any, named: str, checkpoint: Callable[[str], Path]
) -> None:
    folder = edit_config(checkpoint(ONE_OF_EACH[family]), **{field: value})
    with pytest.raises(UnsupportedModel, match=named):
        Refiner.from_pretrained(folder, backend="lean", kv_cache_tokens=256)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama", "pretraining_tp", 2),
        ("llama", "hidden_act", "relu"),
        ("qwen3", "hidden_act", "gelu"),
        ("gemma2", "hidden_activation", "gelu"),
        ("gemma2", "use_bidirectional_attention", True),
        ("qwen3", "layer_types", ["full_attention", "chunked_attention", "full_attention"]),
    ],
)
def test_a_known_field_of_another_value_is_named(
    name: str, field: str, value: Any, checkpoint: Callable[[str], Path]
) -> None:
    config = AutoConfig.from_pretrained(checkpoint(name))
    setattr(config, field, value)
    with pytest.raises(UnsupportedModel, match=field):
        model_spec(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_old_config_files(name: str, checkpoint: Callable[[str], Path]) -> None:
    """rope_theta and rope_scaling beside each other, torch_dtype, no layer_types, null fields, fields of old versions."""
    folder = checkpoint(name)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    plain = rope["rope_type"] == "default"
    edit_config(
        folder, rope_parameters=None, rope_theta=rope["rope_theta"], rope_scaling=None if plain else scaling, dtype=None,
        torch_dtype="float32", layer_types=None, transformers_version="4.38.0", _name_or_path="x",
        _model_name_or_path="of a GGUF file", unk_token_id=0,
    )  # fmt: skip
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | ({"rope_scaling": None} if plain else {})))
    same_text(folder)


def test_no_head_dim_no_kv_heads_no_theta(checkpoint: Callable[[str], Path]) -> None:
    """The first Llama configurations."""
    folder = checkpoint("mistral-tied")
    assert json.loads((folder / "config.json").read_text())["head_dim"] in (None, 12)
    same_text(edit_config(folder, head_dim=None, rope_parameters=None))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32},
        {"rope_type": "default", "rope_theta": 5e5},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_rope_types(rope: dict[str, Any], family: str, checkpoint: Callable[[str], Path]) -> None:
    same_text(edit_config(checkpoint(ONE_OF_EACH[family]), rope_parameters=rope))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gemma2", {"sliding_window": 5, "query_pre_attn_scalar": 7}),
        ("gemma2", {"final_logit_softcapping": 1.5, "attn_logit_softcapping": 2.0}),
        ("gemma2", {"rms_norm_eps": 0.5}),
        ("llama", {"rms_norm_eps": 0.5}),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
        ("mistral-window", {"sliding_window": 2}),
        ("mistral-window", {"sliding_window": 70}),
        ("qwen3", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4,
                   "use_sliding_window": True}),
        ("qwen2-some-windows", {"use_sliding_window": False, "layer_types": ["full_attention"] * 3}),
    ],
)  # fmt: skip
def test_fields_that_matter_are_honoured(name: str, fields: dict[str, Any], checkpoint: Callable[[str], Path]) -> None:
    same_text(edit_config(checkpoint(name), **fields))


@pytest.mark.parametrize("model_type", ["phi3", "gemma", "mixtral"])
def test_other_families_are_named(model_type: str) -> None:
    with pytest.raises(UnsupportedModel, match=model_type):
        model_spec(AutoConfig.for_model(model_type))


def test_auto_backend_serves_what_lean_refuses(
    checkpoint: Callable[[str], Path], oracle: Callable[[str], Oracle]
) -> None:
    """A harmless unknown field costs speed, not the result."""
    folder = edit_config(checkpoint("llama"), surprise=1)
    with Refiner.from_pretrained(folder, kv_cache_tokens=2048) as refiner:
        results = refiner.refine([{"prompt_ids": p} for p in PROMPTS], RefineOptions(max_new_tokens=20))
    assert [result.token_ids for result in results] == [oracle("llama").greedy(p, 20) for p in PROMPTS]
