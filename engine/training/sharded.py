"""Checkpoints of a model sharded by ``fully_shard``: weights as one file, the optimiser in a part per process."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

_OPTIMIZER, _SCHEDULER = "optimizer", "scheduler.pt"


def gathered_weights(model: Any) -> dict[str, Any]:
    """All weights in the first process's memory, tied ones once; the other processes, which must call it too, get none."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: value for name, value in get_model_state_dict(model, options=whole).items() if name in names}


def save_sharded_optimizer(folder: Path, model: Any, optimizer: Any) -> None:
    """Writes each process's part."""
    dcp.save({_OPTIMIZER: get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder / _OPTIMIZER)


def load_sharded_optimizer(folder: Path, model: Any, optimizer: Any) -> None:
    """Reads what this process's part of the model needs."""
    state = get_optimizer_state_dict(model, optimizer)
    dcp.load({_OPTIMIZER: state}, checkpoint_id=folder / _OPTIMIZER)
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state)


def save_scheduler(folder: Path, scheduler: Any) -> None:
    """Writes the learning rate's schedule, as the trainer does."""
    torch.save(scheduler.state_dict(), folder / _SCHEDULER)


def load_scheduler(folder: Path, scheduler: Any) -> None:
    """Reads what ``save_scheduler`` has written."""
    scheduler.load_state_dict(torch.load(folder / _SCHEDULER, weights_only=True))
