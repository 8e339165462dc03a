"""Settings of a training run, checked before any work starts."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

ALL_LINEAR = ("all-linear",)


class ConfigError(ValueError):
    """Settings that cannot be trained with; the message says got, expected and what to do."""


def _free(default: Any) -> Any:
    """A field that may differ when a run is resumed: it does not decide what is learned."""
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What a training run does. Defaults are those of the paper (arXiv 2503.04240) where it gives one, else those of the
    training script of Consistency LLM, on which it builds; the others are this project's own."""

    model: str
    """Checkpoint folder or hub id to start from; any causal LM that train_step takes."""
    data: str
    """Trajectory file, as written by engine.trajectories (.jsonl, .json, either gzipped, or .parquet)."""
    output: str
    """Folder for checkpoints, samples, the log and, at the end, the refiner (in model/)."""
    eval_data: str | None = None
    """Trajectory file to evaluate on."""
    held_out: int = 0
    """Instead of eval_data: this many trajectories from the end of data are evaluated on and never trained on."""

    omega: float = 1e3
    """Weight of the consistency loss (paper); 0: plain fine-tuning on the best responses, drafts are then only evaluated."""
    window: int = 256
    """Response tokens that are trained on, from the start (paper: N)."""
    responses: int = 6
    """Ranked responses per prompt (paper: T); of more, the best, the worst and evenly spaced ones between are kept."""
    drafts: int = 1
    """Drafts per target and step, drawn uniformly from the other responses (paper: one t)."""
    kl_normalization: Literal["token", "vocabulary"] = "token"
    """Mean of the KL over positions, or over positions and vocabulary; omega weighs |V| times less in the second."""

    lr: float = 2e-5
    """Peak learning rate of AdamW (Consistency LLM)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up (Consistency LLM)."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises (Consistency LLM)."""
    epochs: float = 1.0
    """Passes over the data (Consistency LLM)."""
    steps: int | None = None
    """Optimiser steps, instead of epochs."""
    batch_size: int = 8
    """Trajectories per optimiser step, over all processes (Consistency LLM: 8 processes with one each). What an epoch has
    beyond a multiple of it waits for another epoch's order."""
    micro_batch: int | None = _free(None)
    """Trajectories per forward pass and process; null: its whole share of batch_size. Smaller ones accumulate gradients to
    the same sum in less memory."""
    max_tokens: int | None = None
    """Trajectories share rows of at most this many tokens; longer ones are left out. null: one per row."""
    weight_decay: float = 0.0
    """Of AdamW (Consistency LLM)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm (transformers' default)."""
    seed: int = 0
    """Of the order of trajectories, the drafts drawn, dropout and new LoRA weights."""

    lora_rank: int = 0
    """Rank of LoRA adapters, which are then all that is trained; 0: train all weights."""
    lora_alpha: int | None = None
    """Scale of the adapters; null: twice the rank."""
    lora_dropout: float = 0.0
    """Dropout in front of the adapters."""
    lora_targets: tuple[str, ...] = ALL_LINEAR
    """Names of the modules that get adapters; all-linear: every linear layer but the head."""

    device: Literal["auto", "cpu", "cuda"] = _free("auto")
    """auto: a GPU if there is one."""
    bf16: bool = False
    """Autocast to bfloat16 (Consistency LLM trains so); the loss stays in float32."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the stored weights; bfloat16 only for those that LoRA leaves alone."""
    attention: Literal["auto", "sdpa", "eager", "flex_attention"] = "auto"
    """auto: sdpa, or eager for models whose attention scores are capped; flex_attention needs a GPU."""
    gradient_checkpointing: bool = _free(False)
    """Compute activations again in the backward pass, to save memory."""
    fsdp: bool = False
    """Under torchrun: shard weights, gradients and optimiser over the processes (FSDP2), instead of copies (DDP)."""
    loss_impl: Literal["auto", "torch", "cpp", "triton"] = "auto"
    """Implementation of the loss; see engine.consistency_loss."""
    loader_workers: int = _free(0)
    """Processes that prepare batches ahead."""
    trust_remote_code: bool = False
    """Run code that the checkpoint brings."""

    log_every: int = _free(10)
    """Steps between log lines (Consistency LLM)."""
    save_every: int = _free(100)
    """Steps between checkpoints (Consistency LLM); there is one at the end of a run and after Ctrl-C too."""
    keep_checkpoints: int = _free(2)
    """Checkpoints kept, the latest ones."""
    eval_every: int = _free(100)
    """Steps between evaluations, if there is something to evaluate on; there is one at the end too."""
    samples: int = _free(4)
    """Evaluation prompts whose worst draft is refined in 1, 2, 4 and 8 steps at each evaluation, into samples.jsonl."""
    explosion: float = _free(50.0)
    """Stop when a step's loss is this many times the median of the last 50 steps' (NaN and infinity always stop); 0: never."""
    report_to: tuple[str, ...] = _free(())
    """Trackers of transformers that get the log too, such as tensorboard or wandb."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = _free(None)
    """Of the refiner's weights in model/, rounded once training is over; null: as they were trained. Checkpoints stay as they
    are, so that the same command goes on from them."""
    overwrite: bool = _free(False)
    """Start anew in an output that holds another run, or this one finished."""

    def __post_init__(self) -> None:
        _check_ranges(self)
        _check_combinations(self)

    @property
    def deciding(self) -> dict[str, Any]:
        """The fields that decide what is learned, but for the files they name."""
        names = [f.name for f in dataclasses.fields(self) if not f.metadata.get("free")]
        return {
            name: plain(getattr(self, name)) for name in names if name not in ("model", "data", "eval_data", "output")
        }

    def fields(self) -> dict[str, Any]:
        """All of them, as YAML has them."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def plain(value: Any) -> Any:
    """A value as YAML and JSON have it."""
    return list(value) if isinstance(value, tuple) else value


_AT_LEAST: dict[str, float] = {
    "held_out": 0, "omega": 0, "window": 1, "responses": 1, "drafts": 0, "warmup": 0, "steps": 1, "batch_size": 1,
    "micro_batch": 1, "max_tokens": 1, "weight_decay": 0, "seed": 0, "lora_rank": 0, "lora_dropout": 0, "loader_workers": 0,
    "log_every": 1, "save_every": 1, "keep_checkpoints": 1, "eval_every": 1, "samples": 0, "explosion": 0,
}  # fmt: skip
_ABOVE_ZERO = ("lr", "epochs", "max_grad_norm", "lora_alpha")
_BELOW_ONE = ("warmup", "lora_dropout")


def _check_ranges(config: TrainConfig) -> None:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{f.name} must be a finite number, got {value}")
        if value is None:
            continue
        if f.name in _AT_LEAST and value < _AT_LEAST[f.name]:
            raise ConfigError(f"{f.name} must be at least {_AT_LEAST[f.name]:g}, got {value}")
        if f.name in _ABOVE_ZERO and value <= 0:
            raise ConfigError(f"{f.name} must be above 0, got {value}")
        if f.name in _BELOW_ONE and value >= 1:
            raise ConfigError(f"{f.name} is a share of the whole: expected 0 <= {f.name} < 1, got {value}")
        if value == "":
            raise ConfigError(f"{f.name} is empty: name a file or folder, or leave it out")


def _check_combinations(config: TrainConfig) -> None:
    for reason in (*_contradictions(config), *_impossible_on_machine(config), *_lora_contradictions(config)):
        raise ConfigError(reason)


def _contradictions(c: TrainConfig) -> Iterator[str]:
    weighs = f"omega={c.omega:g} weighs a loss of drafts, but"
    if c.omega > 0 and c.drafts == 0:
        yield f"{weighs} drafts=0: set omega=0 for plain fine-tuning, or drafts=1"
    if c.omega > 0 and c.responses == 1:
        yield f"{weighs} responses=1 keeps only the best: set omega=0 for plain fine-tuning, or responses=6"
    if c.drafts >= c.responses > 1:
        yield (
            f"drafts={c.drafts} cannot be drawn from responses={c.responses}, one of which is the target: at most "
            f"drafts={c.responses - 1}, or more responses"
        )
    if c.eval_data is not None and c.held_out > 0:
        yield "eval_data and held_out both say what to evaluate on: give one of them"
    if c.steps is not None and c.epochs != 1.0:
        yield f"steps={c.steps} and epochs={c.epochs:g} both say how long to train: give one of them"
    if c.micro_batch is not None and c.batch_size % c.micro_batch:
        yield f"batch_size={c.batch_size} is not a multiple of micro_batch={c.micro_batch}: change one of them"


def _impossible_on_machine(c: TrainConfig) -> Iterator[str]:
    if c.dtype == "bfloat16" and not c.lora_rank:
        yield "dtype=bfloat16 would round most steps of AdamW away: keep float32 and set bf16=true, or set lora_rank"
    if c.dtype == "bfloat16" and not c.bf16:
        yield "dtype=bfloat16 with bf16=false: LoRA's weights are float32, set bf16=true"
    if c.attention == "flex_attention" and c.device == "cpu":
        yield "attention=flex_attention takes no gradient on device=cpu: use sdpa or eager"
    if c.loss_impl == "triton" and c.device == "cpu":
        yield "loss_impl=triton needs a GPU, got device=cpu: use auto"


def _lora_contradictions(c: TrainConfig) -> Iterator[str]:
    if c.lora_rank and c.fsdp:
        yield (
            f"fsdp=true with lora_rank={c.lora_rank}: FSDP2 wants one dtype per layer, and adapters of sharded weights could "
            "not be merged into the refiner at the end; leave fsdp out (dtype=bfloat16 halves the frozen copies), or set "
            "lora_rank=0"
        )
    if c.lora_rank and not c.lora_targets:
        yield "lora_targets is empty: name modules, or all-linear"
    changed = c.lora_alpha is not None or c.lora_dropout > 0 or c.lora_targets != ALL_LINEAR
    if not c.lora_rank and changed:
        yield "LoRA has settings, but lora_rank=0 trains all weights: set lora_rank, or leave them out"
