"""Tiny training runs: a random model with the shipped tokenizer, random texts, and the command line or the trainer itself."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from engine import train as command
from engine.jacobi import Vocabulary
from engine.refiner import DEFAULT_CHECKPOINT
from engine.training import Trajectory
from engine.training.config import TrainConfig
from engine.training.data import Trajectories
from engine.training.trainer import RefinerTrainer
from tests.engine.checkpoints import PAD
from tests.engine.training.references import EOS

WORDS = "egg water boil ten minutes cold hot the a put it then peel salt and wait".split()


def make_model(folder: Path, *, tied: bool = True, seed: int = 0) -> Path:
    """A checkpoint with dropout in its attention, so that a run depends on the state of the random generators."""
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, tie_word_embeddings=tied, attention_dropout=0.1, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_data(path: Path, rows: int = 14, seed: int = 0) -> Path:
    """Prompts with four scored answers each."""
    rng = random.Random(seed)
    lines = []
    for index in range(rows):
        texts = [" ".join(rng.choices(WORDS, k=rng.randrange(3, 14))) for _ in range(5)]
        responses = [{"model": f"m{i}", "text": text, "reward": rng.random()} for i, text in enumerate(texts[1:])]
        lines.append(json.dumps({"prompt_id": f"row{index}", "prompt": f"{index} {texts[0]}", "responses": responses}))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_config(path: Path, **settings: Any) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


def small_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run of 9 steps, 3 to an epoch, evaluated on 2 held-out rows."""
    model, data = folder / "base", folder / "data.jsonl"
    if not model.exists():
        make_model(model)
        make_data(data)
    settings = {
        "model": str(model), "data": str(data), "output": str(folder / "run"), "held_out": 2, "batch_size": 4, "epochs": 3,
        "window": 16, "lr": 1e-3, "log_every": 2, "save_every": 2, "eval_every": 4, "samples": 1, "device": "cpu",
    }  # fmt: skip
    return {**settings, **changes}


def run(settings: dict[str, Any]) -> int:
    """The command's exit status, in this process."""
    return command.main([f"{name}={json.dumps(value)}" for name, value in settings.items()])


def start(
    settings: dict[str, Any], *, processes: int | None = None, code: str | None = None
) -> "subprocess.Popen[str]":
    """The command in processes of its own, or ``code`` that runs it."""
    launcher = [sys.executable, *(("-c", code) if code else ("-m", "engine.train"))]
    if processes:
        launcher = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m",
            "engine.train",
        ]  # fmt: skip
    given = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    # equal bits need equal sums: as many threads as the runs in this process have
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [*launcher, *given], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def optimizer_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    return state


def log_of(output: Path) -> list[dict[str, float]]:
    """The log without what depends on the clock."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    lines = [{name: value for name, value in line.items() if "runtime" not in name} for line in history]
    return [line for line in lines if "train_loss" not in line]


def assert_same(a: Any, b: Any) -> None:
    """To the bit, whatever is nested in them."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


class Gradients(TrainerCallback):
    """Keeps those of each step, unclipped as long as ``max_grad_norm`` is large."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        named = model.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def trainer_on(
    model: nn.Module,
    given: Sequence[Trajectory],
    folder: Path,
    *,
    evaluation: Sequence[Trajectory] = (),
    **changes: Any,
) -> RefinerTrainer:
    """The trainer by itself on trajectories of ids; it saves nothing."""
    config = dataclasses.replace(
        TrainConfig(model="unused", data="unused", output=str(folder)),
        **{"batch_size": len(given), "steps": 1, "lr": 1e-3, "max_grad_norm": 1e9, "samples": 0, **changes},
    )
    micro_batch = config.micro_batch or config.batch_size
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=config.steps or -1, learning_rate=config.lr,
        per_device_train_batch_size=micro_batch, gradient_accumulation_steps=config.batch_size // micro_batch,
        max_grad_norm=config.max_grad_norm, save_strategy="no", eval_strategy="no", logging_steps=1, report_to="none",
        disable_tqdm=True, remove_unused_columns=False, bf16=config.bf16, logging_nan_inf_filter=False, optim="adamw_torch",
    )  # fmt: skip
    return RefinerTrainer(
        model, args, config, train=Trajectories(given), evaluation=Trajectories(evaluation) if evaluation else None,
        vocabulary=Vocabulary(101, frozenset([EOS]), PAD), tokenizer=AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT),
    )  # fmt: skip
