"""Reading of safetensors checkpoints: sharded, in other dtypes, incomplete, wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from engine import RefineOptions, Refiner, UnsupportedModel
from engine.batch import Feed, StepBatch
from engine.kernels.linear_argmax import logits
from engine.kv_cache import pages_for
from engine.model import Decoder
from engine.weights import resolve_checkpoint
from tests.engine.checkpoints import FAMILIES, Oracle, generate, prompts

PROMPTS = prompts(1)
CPU = torch.device("cpu")


def refine(folder: Path, limit: int = 20) -> list[list[int]]:
    with Refiner.from_pretrained(folder, backend="lean", kv_cache_tokens=2048) as refiner:
        results = refiner.refine([{"prompt_ids": p} for p in PROMPTS], RefineOptions(max_new_tokens=limit))
    return [result.token_ids for result in results]


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", FAMILIES)
def test_sharded(name: str, oracle: Callable[[str], Oracle], tmp_path: Path) -> None:
    oracle(name).model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert refine(tmp_path) == [oracle(name).greedy(p, 20) for p in PROMPTS]


def test_a_missing_shard_is_named(oracle: Callable[[str], Oracle], tmp_path: Path) -> None:
    oracle("llama").model.save_pretrained(tmp_path, max_shard_size="50KB")
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(FileNotFoundError, match=victim.name):
        refine(tmp_path)


def test_model_safetensors_is_the_one_that_counts(
    checkpoint: Callable[[str], Path], oracle: Callable[[str], Oracle]
) -> None:
    """As in transformers: neither another format's file beside it is read, nor an index left by an earlier save."""
    folder = checkpoint("llama")
    save_file({"tok_embeddings.weight": torch.ones(3, 3)}, folder / "consolidated.safetensors")
    index = {"weight_map": {"model.norm.weight": "consolidated.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refine(folder) == [oracle("llama").greedy(p, 20) for p in PROMPTS]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_needed_and_used(name: str, checkpoint: Callable[[str], Path]) -> None:
    """Without any one of them the model is refused by its name."""
    folder = checkpoint(name)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    config = AutoConfig.from_pretrained(folder)
    for missing in [key for key in tensors if "layers." not in key or "layers.1." in key]:
        save_file({k: v for k, v in tensors.items() if k != missing}, file, metadata={"format": "pt"})
        with pytest.raises(UnsupportedModel, match=missing):
            Decoder.load(folder, config, torch.float32, CPU)


def test_a_bias_the_config_does_not_ask_for_is_named(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("mistral-window")
    name = "model.layers.0.self_attn.o_proj.bias"
    change(folder, lambda tensors: tensors.update({name: torch.zeros(48)}))
    with pytest.raises(UnsupportedModel, match=name):
        Decoder.load(folder, AutoConfig.from_pretrained(folder), torch.float32, CPU)


def test_a_wrong_shape_names_tensor_and_both_shapes(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    change(folder, lambda tensors: tensors.update({name: torch.zeros(71, 48)}))
    with pytest.raises(UnsupportedModel, match=rf"{name}.*\[71, 48\].*\[72, 48\]"):
        refine(folder)


@pytest.mark.parametrize(
    "extra", ["model.layers.0.self_attn.q_norm.weight", "model.layers.3.mlp.up_proj.weight", "lm_head.bias", "score"]
)
def test_a_tensor_left_over_is_named(extra: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    change(folder, lambda tensors: tensors.update({extra: torch.zeros(4)}))
    with pytest.raises(UnsupportedModel, match=extra):
        refine(folder)


def test_integers_are_refused(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    change(folder, lambda tensors: tensors.update({name: torch.zeros(72, 48, dtype=torch.int8)}))
    with pytest.raises(UnsupportedModel, match=f"{name}.*quantised"):
        refine(folder)


def test_derived_buffers_and_a_tied_heads_copy_are_passed_over(
    checkpoint: Callable[[str], Path], oracle: Callable[[str], Oracle]
) -> None:
    folder = checkpoint("llama-tied")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(10)}

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors.update(extra, **{"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})

    change(folder, edit)
    assert refine(folder) == [oracle("llama-tied").greedy(p, 20) for p in PROMPTS]


def test_a_tied_models_own_head_counts_where_it_differs(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama-tied")
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].flip(0).clone()}))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    assert refine(folder) == [generate(theirs, p, 20) for p in PROMPTS]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2-tied"])
def test_other_dtypes_are_loaded_as_float32(name: str, dtype: torch.dtype, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(name)
    change(folder, lambda tensors: tensors.update({key: value.to(dtype) for key, value in tensors.items()}))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    assert refine(folder) == [generate(model, p, 20) for p in PROMPTS]


@pytest.mark.parametrize("name", FAMILIES)
def test_of_a_model_in_memory(name: str, oracle: Callable[[str], Oracle]) -> None:
    """The same weights as by way of a file, and a copy: what becomes of the model afterwards does not matter."""
    o = oracle(name)
    tensors = {key: tensor.clone() for key, tensor in o.model.state_dict().items()}
    if o.model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model = Decoder.from_tensors(o.model.config, tensors, torch.float32, CPU)
    for tensor in tensors.values():
        tensor.zero_()
    loaded = Decoder.load(o.folder, o.model.config, torch.float32, CPU)
    assert torch.equal(all_logits(model, PROMPTS[2]), all_logits(loaded, PROMPTS[2]))


def test_of_a_model_in_memory_that_does_not_fit_its_configuration(oracle: Callable[[str], Oracle]) -> None:
    o = oracle("llama")
    name, tensors = "model.layers.1.mlp.up_proj.weight", dict(o.model.state_dict())
    for wrong, message in (
        ({k: v for k, v in tensors.items() if k != name}, name),
        (tensors | {name: torch.zeros(71, 48)}, rf"{name}.*\[71, 48\].*\[72, 48\]"),
        (tensors | {"score": torch.zeros(1)}, "memory.*score"),
    ):
        with pytest.raises(UnsupportedModel, match=message):
            Decoder.from_tensors(o.model.config, wrong, torch.float32, CPU)


def all_logits(model: Decoder, text: list[int]) -> Tensor:
    pages = list(range(pages_for(len(text))))
    batch = StepBatch.pack([Feed(text, 0, pages, 0)], CPU)
    hidden = model.forward(batch, model.new_cache(len(pages)))
    return logits(hidden, model.head.weight, model.head.bias, softcap=model.head.softcap)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_nearer_to_float32_than_transformers_bfloat16(name: str, oracle: Callable[[str], Oracle]) -> None:
    """Weights rounded, arithmetic in float32 at least as exact: the plain bfloat16 model's error is the yardstick."""
    folder = oracle(name).folder
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.bfloat16)
    model = Decoder.load(folder, AutoConfig.from_pretrained(folder), torch.bfloat16, CPU)
    ours, theirs = [], []
    with torch.no_grad():
        for text in PROMPTS[2:]:
            exact = oracle(name).logits(text)
            ours.append((all_logits(model, text) - exact).square().mean())
            theirs.append((plain(input_ids=torch.tensor([text])).logits[0].float() - exact).square().mean())
    assert 0 < sum(ours) < sum(theirs)


@pytest.mark.parametrize("backend", ["lean", "hf"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_runs_and_does_not_depend_on_the_draft(
    backend: str, dtype: str, oracle: Callable[[str], Oracle]
) -> None:
    with Refiner.from_pretrained(oracle("llama").folder, dtype=dtype, kv_cache_tokens=2048, backend=backend) as refiner:  # type: ignore[arg-type]
        plain = refiner.refine([{"prompt_ids": p} for p in PROMPTS], RefineOptions(max_new_tokens=20, window=1))
        assert all(result.error is None and result.converged for result in plain)
        if backend == "lean" and dtype == "bfloat16":  # the C++ kernels, whose bits do not depend on the batch
            requests = [{"prompt_ids": p, "draft_ids": r.token_ids[::-1]} for p, r in zip(PROMPTS, plain, strict=True)]
            again = refiner.refine(requests, RefineOptions(max_new_tokens=20, window=9))
            assert [result.token_ids for result in again] == [result.token_ids for result in plain]


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "absent", tmp_path / "file", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="not a model folder"):
            resolve_checkpoint(path)


def test_a_folder_without_safetensors(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="only safetensors"):
        refine(folder)
