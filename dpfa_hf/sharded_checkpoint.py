"""Checkpoints of models that FSDP2 has spread, by torch.distributed.checkpoint: every process writes its own part.

They can be read by another number of processes, and by one process with the model in one piece.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

_MODEL, _OPTIMIZER = "model_shards", "optimizer_shards"


def is_sharded(checkpoint: str) -> bool:
    """Whether a checkpoint's folder was written by `save_model` of this module."""
    return (Path(checkpoint) / _MODEL).is_dir()


def save_model(checkpoint: str, model: nn.Module) -> None:
    """Writes the model's parameters and buffers; all processes call it together."""
    dcp.save(get_model_state_dict(model), checkpoint_id=str(Path(checkpoint) / _MODEL))


def load_model(checkpoint: str, model: nn.Module) -> None:
    """Reads what `save_model` wrote into the model; all processes call it together."""
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=str(Path(checkpoint) / _MODEL))
    set_model_state_dict(model, state)


def save_optimizer(checkpoint: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes the optimizer's state; all processes call it together."""
    dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=str(Path(checkpoint) / _OPTIMIZER))


def load_optimizer(checkpoint: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Reads what `save_optimizer` wrote into the optimizer; all processes call it together."""
    state = get_optimizer_state_dict(model, optimizer)
    dcp.load(state, checkpoint_id=str(Path(checkpoint) / _OPTIMIZER))
    set_optimizer_state_dict(model, optimizer, state)


def gathered(model: nn.Module) -> dict[str, Any]:
    """All of the model's parameters and buffers on the CPU of the first process, and {} in the others.

    To give the model away, at the end; nothing in training needs it. All processes call it together.
    """
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
