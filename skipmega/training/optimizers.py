"""Building the optimizer for a stage."""

from typing import Any

import torch
from torch import nn

from skipmega.config import RunConfig
from skipmega.parallel.logical import partition_dim
from skipmega.parallel.grid import ParallelGrid
from skipmega.training.adafactor import ShardedAdafactor, ShardLayout


def build_optimizer(stage: nn.Module, config: RunConfig, grid: ParallelGrid) -> torch.optim.Optimizer:
    """The configured optimizer over ``stage``'s parameters; vectors (norms) are never decayed."""
    settings = config.optimizer
    if settings.name == "adafactor":
        return ShardedAdafactor(
            _one_group_each(stage, settings.weight_decay),
            grid,
            lr=settings.learning_rate,
            beta2=settings.beta2,
            update_clip=settings.update_clip,
            weight_decay=settings.weight_decay,
        )
    matrices = [p for p in stage.parameters() if p.dim() > 1]
    vectors = [p for p in stage.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=grid.device.type == "cuda",
    )


def _one_group_each(stage: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    return [
        {
            "params": [parameter],
            "weight_decay": weight_decay if parameter.dim() > 1 else 0.0,
            "layout": ShardLayout(name, tuple(parameter.shape), partition_dim(parameter)),
        }
        for name, parameter in stage.named_parameters()
    ]
