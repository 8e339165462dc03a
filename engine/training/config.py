"""Settings of a training run: one dataclass, read from YAML and ``key=value``, checked before any work starts."""

import ast
import dataclasses
import difflib
import inspect
import math
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


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
    lora_alpha: float | None = None
    """Scale of the adapters; null: twice the rank."""
    lora_dropout: float = 0.0
    """Dropout in front of the adapters."""
    lora_targets: tuple[str, ...] = ("all-linear",)
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
            name: _plain(getattr(self, name)) for name in names if name not in ("model", "data", "eval_data", "output")
        }

    def fields(self) -> dict[str, Any]:
        """All of them, as YAML has them."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


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
    c = config
    own_steps = c.steps is not None
    refusals: list[tuple[bool, str]] = [
        (c.omega > 0 and c.drafts == 0, f"omega={c.omega:g} weighs a loss of drafts, but drafts=0: set omega=0 for plain fine-tuning, or drafts=1"),
        (c.omega > 0 and c.responses == 1, f"omega={c.omega:g} weighs a loss of drafts, but responses=1 leaves only the best: set omega=0, or responses=6"),
        (c.eval_data is not None and c.held_out > 0, "eval_data and held_out both say what to evaluate on: give one of them"),
        (own_steps and c.epochs != 1.0, f"steps={c.steps} and epochs={c.epochs:g} both say how long to train: give one of them"),
        (c.micro_batch is not None and c.batch_size % c.micro_batch != 0, f"batch_size={c.batch_size} is not a multiple of micro_batch={c.micro_batch}: change one of them"),
        (c.dtype == "bfloat16" and not c.lora_rank, "dtype=bfloat16 would lose most steps of AdamW to rounding: keep float32 and set bf16=true, or set lora_rank"),
        (c.dtype == "bfloat16" and not c.bf16, "dtype=bfloat16 needs bf16=true: the adapters are float32"),
        (c.fsdp and c.lora_rank > 0, "fsdp=true shards what is trained, but LoRA trains almost nothing: leave fsdp out (torchrun then runs DDP), or lora_rank"),
        (not c.lora_rank and (c.lora_alpha is not None or c.lora_dropout > 0 or c.lora_targets != ("all-linear",)), "LoRA has settings but lora_rank=0 trains all weights: set lora_rank, or leave them out"),
        (bool(c.lora_rank) and not c.lora_targets, "lora_targets is empty: name modules, or all-linear"),
        (c.attention == "flex_attention" and c.device == "cpu", "attention=flex_attention takes no gradient on device=cpu: use sdpa or eager"),
        (c.loss_impl == "triton" and c.device == "cpu", "loss_impl=triton needs a GPU, got device=cpu: use auto"),
    ]  # fmt: skip
    for refused, reason in refusals:
        if refused:
            raise ConfigError(reason)


def read_config(path: str | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """The settings of a YAML file, those given as ``key=value`` on top. Raises ConfigError, OSError."""
    values: dict[str, Any] = {}
    if path is not None:
        values.update(_read_yaml(path))
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"expected key=value behind the config file, got {text!r}")
        values[name] = _yaml(value, f"{name}=")
    return make_config(values)


def make_config(values: dict[str, Any]) -> TrainConfig:
    """The settings of these names, each checked for its type. Raises ConfigError."""
    hints = get_type_hints(TrainConfig)
    for name in values:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "--help lists all"
            raise ConfigError(f"there is no setting {name!r}; {hint}")
    missing = [f.name for f in dataclasses.fields(TrainConfig) if _required(f) and values.get(f.name) is None]
    if missing:
        raise ConfigError(f"{missing[0]} is missing: set it in the file, or as {missing[0]}=..")
    return TrainConfig(**{name: _typed(name, value, hints[name]) for name, value in values.items()})


def describe() -> str:
    """Every setting with its type, default and docstring."""
    hints, docs = get_type_hints(TrainConfig), _docs()
    parts = []
    for f in dataclasses.fields(TrainConfig):
        default = "required" if _required(f) else f"default: {yaml_text(f.default)}"
        parts.append(f"  {f.name} ({_type_name(hints[f.name])}; {default})\n      {docs[f.name]}")
    return "\n".join(parts)


def yaml_text(value: Any) -> str:
    """A value as it stands in a config file."""
    text: str = yaml.safe_dump(_plain(value), default_flow_style=True, width=math.inf)
    return text.removesuffix("\n...\n").strip()


def _required(f: "dataclasses.Field[Any]") -> bool:
    return f.default is dataclasses.MISSING


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _docs() -> dict[str, str]:
    """The docstrings below the fields, which Python itself does not keep."""
    body = ast.parse(inspect.getsource(TrainConfig)).body[0].body  # type: ignore[attr-defined]
    docs: dict[str, str] = {}
    for entry, following in zip(body, body[1:], strict=False):
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name) and isinstance(following, ast.Expr):
            docs[entry.target.id] = " ".join(ast.literal_eval(following.value).split())
    return docs


def _read_yaml(path: str) -> dict[str, Any]:
    values = _yaml(Path(path).read_text(encoding="utf-8"), path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings as 'key: value' lines, got a {type(values).__name__}")
    return values


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, where YAML would let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{key} is set twice: keep one of them")
        return super().construct_mapping(node, deep)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from None


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as the type of its field. Raises ConfigError."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    if get_origin(kind) is Literal and value in get_args(kind) and isinstance(value, str):
        return value
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 2e-5, without a point, as a text
        value = _number(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _as_float(value)
    if get_origin(kind) is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | tuple) and all(isinstance(item, str) for item in items):
            return tuple(items)
    elif kind in (bool, str, int) and type(value) is kind:
        return value
    raise ConfigError(f"{name} must be {_type_name(hint)}, got {value!r:.80} ({type(value).__name__})")


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf  # the check of ranges refuses it by name


def _type_name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return "list of texts"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
    return names[hint]
