"""The optimizers that a run can have, and their state as tensors of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from upt_fast.train.config import TrainConfig

# PyTorch's names of what an optimizer keeps for a parameter -> those in checkpoints, in front of the parameter's
STATE_NAMES = {"momentum_buffer": "momentum", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "step": "step"}


def build_optimizer(config: TrainConfig, model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """The optimizer of a run's settings.

    Args:
        config: optimizer, lr, momentum (SGD's; AdamW has PyTorch's betas and eps) and weight_decay.
        model: whose parameters are trained.
        fused: one kernel for all parameters, which a CUDA graph can hold.
    """
    parameters, options = model.parameters(), {"lr": config.lr, "weight_decay": config.weight_decay, "fused": fused}
    if config.optimizer == "adamw":
        # it counts steps: a capture wants to be told that it may be held, though fused it counts on the GPU anyway
        return torch.optim.AdamW(parameters, capturable=fused, **options)  # type: ignore[arg-type]
    return torch.optim.SGD(parameters, momentum=config.momentum, **options)  # type: ignore[arg-type]


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer keeps, by "momentum.NAME" and so on, NAME being a parameter's."""
    return {
        f"{STATE_NAMES[key]}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
        if key in STATE_NAMES and value is not None
    }


def restore_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`state_tensors` gave."""
    for name, parameter in model.named_parameters():
        for key, kind in STATE_NAMES.items():
            value = tensors.get(f"{kind}.{name}")
            if value is not None:
                # AdamW counts steps on the CPU, unless it is fused
                counts = key == "step" and not any(group.get("fused") for group in optimizer.param_groups)
                optimizer.state[parameter][key] = value.clone() if counts else value.to(parameter, copy=True)
