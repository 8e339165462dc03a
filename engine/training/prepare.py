"""From settings to what the trainer takes: model, data and transformers' own arguments, each refused if it cannot work."""

import importlib.util
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations

from engine.errors import InvalidTrajectory
from engine.jacobi import Vocabulary
from engine.job.output import Settings
from engine.job.settings import checkpoint_digest
from engine.job.source import Source
from engine.refiner import read_vocabulary
from engine.text import load_tokenizer
from engine.training.config import ALL_LINEAR, ConfigError, TrainConfig
from engine.training.data import LeftOut, Trajectories, select
from engine.training.layout import Trajectory
from engine.training.verify import verify_model
from engine.trajectories.dataset import load
from engine.weights import resolve_checkpoint

logger = logging.getLogger("engine.training")


@dataclass(frozen=True, slots=True)
class Start:
    """What a run starts from, found and looked at, nothing of it loaded yet."""

    folder: Path
    model_config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    settings: Settings
    """The run's record: what decides what is learned."""
    processes: int
    micro_batch: int
    device: str


def look(config: TrainConfig) -> Start:
    """Finds files and packages. Raises ConfigError, OSError, ValueError, EngineError."""
    sources = {"data": config.data} | ({"eval_data": config.eval_data} if config.eval_data else {})
    digests: dict[str, Any] = {}
    for name, path in sources.items():
        digests[name] = {"digest": Source.open(path).digest}
        if digests[name]["digest"] is None:
            raise ConfigError(f"{name}={path} must be a regular file: it is read again when a run is resumed")
    _check_packages(config)
    device, processes = _device(config), int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch = _micro_batch(config, processes)
    folder = resolve_checkpoint(config.model)
    model_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    if load_tokenizer(folder, config.trust_remote_code) is None:
        raise ConfigError(f"model={config.model} has no tokenizer: save one beside it with its save_pretrained")
    # another one than training reads with, which knows no longest text: this one is saved beside the weights
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    settings = {"model": {"digest": checkpoint_digest(folder)}, **digests, "settings": config.deciding}
    vocabulary = read_vocabulary(folder, model_config, tokenizer)
    return Start(folder, model_config, tokenizer, vocabulary, settings, processes, micro_batch, device)


def _check_packages(config: TrainConfig) -> None:
    for package, needed in (("accelerate", True), ("peft", config.lora_rank > 0)):
        if needed and importlib.util.find_spec(package) is None:
            raise ConfigError(f"training with these settings needs {package}: pip install 'diffpo-engine[train]'")
    there = get_available_reporting_integrations()
    for name in config.report_to:
        if name not in there:
            raise ConfigError(f"report_to has {name!r}, which is not installed; there are {', '.join(there) or 'none'}")


def _device(config: TrainConfig) -> str:
    gpu = torch.cuda.is_available()
    if config.device == "cuda" and not gpu:
        raise ConfigError("device=cuda, but PyTorch sees no GPU: use device=auto or cpu")
    device = "cuda" if gpu and config.device != "cpu" else "cpu"
    if device == "cpu" and config.attention == "flex_attention":
        raise ConfigError("attention=flex_attention needs a GPU to train on, and there is none: use sdpa or eager")
    if config.fsdp and "RANK" not in os.environ:
        raise ConfigError("fsdp=true needs several processes: torchrun --nproc-per-node N -m engine.train ..")
    return device


def _micro_batch(config: TrainConfig, processes: int) -> int:
    share, rest = divmod(config.batch_size, processes)
    if rest:
        raise ConfigError(
            f"batch_size={config.batch_size} is not a multiple of the {processes} processes: change one of them"
        )
    micro_batch = config.micro_batch or share
    if share % micro_batch:
        raise ConfigError(
            f"each of {processes} processes has {share} of batch_size={config.batch_size}, not a multiple of "
            f"micro_batch={micro_batch}: change one of them"
        )
    return micro_batch


def read_data(config: TrainConfig, start: Start) -> tuple[Trajectories, Trajectories | None]:
    """Training and evaluation trajectories. Raises OSError, ValueError, InvalidTrajectory."""
    train = _read(config, start, "data", config.data)
    evaluation = _read(config, start, "eval_data", config.eval_data) if config.eval_data else None
    if config.held_out:
        train, evaluation = train[: -config.held_out], train[-config.held_out :]
    if len(train) < config.batch_size:
        raise InvalidTrajectory(
            f"data={config.data} leaves {len(train)} trajectories to train on, fewer than batch_size={config.batch_size}: "
            "lower that, or held_out, or give more data"
        )
    drafted = sum(len(trajectory.responses) > 1 for trajectory in train)
    if config.omega and config.drafts and not drafted:
        raise InvalidTrajectory(
            f"no trajectory of data={config.data} has more than one scored response, and omega={config.omega:g} weighs a loss "
            "of drafts: score more responses, or set omega=0"
        )
    there = f"{len(train)} trajectories to train on, {drafted} of them with drafts"
    logger.info("%s%s", there, f"; {len(evaluation)} to evaluate on" if evaluation else "")
    return Trajectories(train), Trajectories(evaluation) if evaluation else None


def _read(config: TrainConfig, start: Start, name: str, path: str) -> list[Trajectory]:
    left_out = LeftOut()
    model_config = start.model_config.get_text_config()
    positions = getattr(model_config, "max_position_embeddings", None) or sys.maxsize
    tokenizer = load_tokenizer(start.folder, config.trust_remote_code)
    assert tokenizer is not None
    kept = list(
        select(
            load(path, tokenizer, eos_ids=start.vocabulary.eos, on_bad=left_out.bad),
            left_out,
            responses=config.responses,
            window=config.window,
            drafts=config.drafts,
            longest_row=config.max_tokens,
            positions=positions,
            vocabulary=model_config.vocab_size,
        )
    )
    if left_out.kinds:
        logger.warning("%s=%s: %d rows kept, left out: %s", name, path, len(kept), left_out)
    if not kept:
        raise InvalidTrajectory(f"{name}={path} has no row that can be used: see python -m engine.trajectories inspect")
    return kept


def arguments(config: TrainConfig, start: Start, *, evaluates: bool) -> TrainingArguments:
    """Those of transformers; making them also starts the process group under torchrun."""
    return TrainingArguments(
        output_dir=config.output,
        per_device_train_batch_size=start.micro_batch,
        gradient_accumulation_steps=config.batch_size // start.processes // start.micro_batch,
        learning_rate=config.lr,
        lr_scheduler_type=config.schedule if config.schedule != "constant" else "constant_with_warmup",
        warmup_steps=config.warmup,
        num_train_epochs=config.epochs,
        max_steps=config.steps or -1,
        optim="adamw_torch",
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        bf16=config.bf16,
        use_cpu=start.device == "cpu",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_steps=config.save_every,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.eval_every,
        report_to=list(config.report_to) or "none",
        disable_tqdm=not sys.stderr.isatty(),
        remove_unused_columns=False,
        dataloader_num_workers=config.loader_workers,
        ddp_find_unused_parameters=False,
    )


def load_model(config: TrainConfig, start: Start, device: torch.device, checkpoint: Path | None) -> nn.Module:
    """The model to train, from a checkpoint of the run if it goes on from one. Raises UnsupportedModel, ConfigError."""
    set_seed(config.seed)  # new LoRA weights are random
    whole = checkpoint if checkpoint and not config.lora_rank else start.folder
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        whole,
        dtype=getattr(torch, config.dtype),
        attn_implementation=_attention(config, start.model_config),
        trust_remote_code=config.trust_remote_code,
    )
    _mend_generation_config(model)
    if not config.fsdp:  # which moves a layer at a time, for models that do not fit in whole
        nn.Module.to(model, device)
    if not (config.fsdp and config.attention == "flex_attention"):  # on a CPU it would be compiled for minutes
        verify_model(model)
    if config.gradient_checkpointing:
        _checkpoint_activations(model)
    if config.lora_rank:
        return _with_lora(model, config)
    if config.fsdp:
        _shard(model, device)
    return model


def _attention(config: TrainConfig, model_config: PreTrainedConfig) -> str:
    capped = getattr(model_config.get_text_config(), "attn_logit_softcapping", None) is not None
    if capped and config.attention == "sdpa":
        raise ConfigError("attention=sdpa leaves out the cap on this model's attention scores: use auto, or eager")
    if config.attention == "auto":
        return "eager" if capped else "sdpa"
    return config.attention


def _mend_generation_config(model: PreTrainedModel) -> None:
    """Some published models have settings of sampling with sampling switched off, which transformers refuses to save."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        logger.info("generation_config.json: sampling is switched on in it, or it could not be saved (%s)", error)
        model.generation_config.do_sample = True


def _checkpoint_activations(model: PreTrainedModel) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.enable_input_require_grads()


def _with_lora(model: PreTrainedModel, config: TrainConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = config.lora_targets
    options = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules=ALL_LINEAR[0] if targets == ALL_LINEAR else list(targets),
    )
    try:
        return get_peft_model(model, options)
    except ValueError as error:
        raise ConfigError(
            f"lora_targets={list(targets)} does not fit the model: {' '.join(str(error).split())}"
        ) from error


def _shard(model: PreTrainedModel, device: torch.device) -> None:
    """FSDP2: each layer by itself, the rest together. accelerate's own plugin would do it on GPUs only."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
