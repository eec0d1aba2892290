"""Building the optimizer of a stage, and its moments once ZeRO has laid the parameters out."""

from typing import Any

import torch
from torch import nn

from skipmega.config import RunConfig
from skipmega.parallel.grid import ParallelGrid
from skipmega.training.adafactor import ShardedAdafactor, locate

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(stage: nn.Module, config: RunConfig, grid: ParallelGrid) -> torch.optim.Optimizer:
    """The configured optimizer over ``stage``'s parameters; vectors (norms) are never decayed."""
    settings = config.optimizer
    groups: list[dict[str, Any]] = [
        {
            "kind": "matrices",
            "params": [p for p in stage.parameters() if p.dim() > 1],
            "weight_decay": settings.weight_decay,
        },
        {"kind": "vectors", "params": [p for p in stage.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if settings.name == "adafactor":
        return ShardedAdafactor(
            groups, grid, lr=settings.learning_rate, beta2=settings.beta2, update_clip=settings.update_clip
        )
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=grid.device.type == "cuda",
    )


def create_moments(zero: Any, stage: nn.Module, grid: ParallelGrid) -> None:
    """Make all moments (zero) before the first step and tell DeepSpeed of them.

    Left to itself DeepSpeed (0.19.8) looks for them after the first *group* has stepped and never finds
    those of the others.

    Args:
        zero: DeepSpeed's ZeRO optimizer around :func:`build_optimizer`'s.
        stage: the module whose parameters it holds.
        grid: this process's place.
    """
    base = zero.optimizer
    if isinstance(base, ShardedAdafactor):
        fragments = [(p.dim(), locate(name, p, grid.tensor)) for name, p in stage.named_parameters()]
        base.place(
            {
                "matrices": [fragment for dims, fragment in fragments if dims > 1],
                "vectors": [fragment for dims, fragment in fragments if dims <= 1],
            }
        )
    else:
        for piece in zero.single_partition_of_fp32_groups:
            steps = torch.zeros((), device=piece.device if base.defaults["fused"] else "cpu")
            base.state[piece] = {"step": steps, **{name: torch.zeros_like(piece) for name in ADAM_MOMENTS}}
    zero._lazy_init_hp_params_optimizer_state()


def updates_done(zero: Any) -> int:
    """Updates the optimizer has done, by its own count (bias correction uses it)."""
    (count,) = {int(state["step"]) for state in zero.optimizer.state.values()}
    return count


def set_updates_done(zero: Any, updates: int) -> None:
    """Set the optimizer's own count of updates."""
    for state in zero.optimizer.state.values():
        state["step"].fill_(updates)
