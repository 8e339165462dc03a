"""Which models can be trained: the check that compares them with their own forward, and typed errors for the others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GraniteConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from engine import Trajectory, TrajectoryCollator, UnsupportedModel, train_step
from engine.training import TrainBatch, verify_model
from tests.engine.checkpoints import FAMILIES, PAD, VOCABULARY
from tests.engine.training.references import chosen_by, double, plain_loss, trajectories

peft = pytest.importorskip("peft")
Family = Callable[..., PreTrainedModel]


def batch_of() -> TrainBatch:
    return TrajectoryCollator(PAD, drafts=2, max_tokens=200)(trajectories(1))


@pytest.mark.parametrize("name", FAMILIES)
def test_tested_families_verify(name: str, family: Family) -> None:
    model = family(name).train()
    verify_model(model)
    assert model.training


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_other_families_verify(attention: str) -> None:
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=VOCABULARY, n_positions=64, initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    verify_model(model)
    given = trajectories(6, longest=12)
    collator = TrajectoryCollator(PAD, drafts=2, max_tokens=200)
    exact = plain_loss(double(model.eval()), chosen_by(collator, given))
    torch.testing.assert_close(
        train_step(model, collator(given), loss_impl="torch").loss.double(), exact.loss, rtol=1e-4, atol=0
    )


def test_a_model_that_changes_its_logits_is_found_out(family: Family) -> None:
    model = family("llama")
    forward = model.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits * 1.1
        return out

    model.forward = changed  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModel, match="computes other logits in a packed row than in its own forward"):
        verify_model(model)


def test_models_that_cannot_be_trained(family: Family) -> None:
    batch = batch_of()
    small = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    scaled = AutoModelForCausalLM.from_config(GraniteConfig(**small, logits_scaling=8.0))
    with pytest.raises(UnsupportedModel, match=r"'logits_scaling' is 8\.0, which train_step does not honour"):
        train_step(scaled, batch)
    with pytest.raises(UnsupportedModel, match="needs a causal language model of transformers, got Linear"):
        train_step(nn.Linear(2, 2), batch)
    with pytest.raises(UnsupportedModel, match="needs a causal language model"):
        train_step(family("llama").get_decoder(), batch)
    prompted = peft.get_peft_model(
        family("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(UnsupportedModel, match="adds virtual tokens to the input"):
        train_step(prompted, batch)
    with pytest.raises(UnsupportedModel, match=r"model\.get_decoder\(\)\.compile\(\)"):
        train_step(torch.compile(family("llama"), backend="eager"), batch)  # type: ignore[arg-type]
    with_dropout = peft.LoraConfig(target_modules=["lm_head"], lora_dropout=0.1)
    with pytest.raises(UnsupportedModel, match="LoRA adapter of the head has dropout"):
        train_step(peft.get_peft_model(family("llama"), with_dropout).train(), batch)


def test_a_batch_elsewhere(family: Family) -> None:
    batch = {name: tensor.to("meta") for name, tensor in batch_of().items()}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="the batch is on meta, the model's embeddings on cpu; move the batch there"):
        train_step(family("llama"), batch)  # type: ignore[arg-type]


def test_a_token_outside_the_vocabulary(family: Family) -> None:
    wrong = [Trajectory(id=0, prompt_ids=[5], responses=[[VOCABULARY]])]
    with pytest.raises(IndexError):
        train_step(family("llama"), TrajectoryCollator(PAD)(wrong), loss_impl="torch")
