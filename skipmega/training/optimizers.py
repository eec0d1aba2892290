"""Building the optimizer of a stage, and its moments once ZeRO has laid the parameters out."""

from typing import Any

import torch
from torch import nn

from skipmega.config import RunConfig
from skipmega.parallel.grid import ParallelGrid
from skipmega.training.adafactor import ShardedAdafactor, locate

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(stage: nn.Module, config: RunConfig, grid: ParallelGrid) -> torch.optim.Optimizer:
    """The configured optimizer over ``stage``'s parameters; vectors (norms, biases) are never decayed.

    Each group has a ``rate``, the factor of the scheduled learning rate.
    """
    settings = config.optimizer
    groups = [
        {
            "name": name,
            "kind": "matrices" if name.endswith("matrices") else "vectors",
            "params": parameters,
            "weight_decay": settings.weight_decay if name.endswith("matrices") else 0.0,
            "rate": config.routing.router_learning_rate if name.startswith("router") else 1.0,
        }
        for name, parameters in _groups(stage, config).items()
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


def _groups(stage: nn.Module, config: RunConfig) -> dict[str, list[nn.Parameter]]:
    """Parameters by the name of their group.

    Routers have groups of their own only at a rate of their own: DeepSpeed takes gradient norms group by
    group over all stages, so every stage must have the same ones. In a group what takes odd room (a router's
    bias) comes last: ZeRO lays parameters end to end, and compiled kernels read those behind it 16 bytes at a
    time.
    """
    apart = config.routing.router_learning_rate != 1.0
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in stage.named_parameters():
        owner = "router_" if apart and ".router." in name else ""
        kind = "matrices" if parameter.dim() > 1 else "vectors"
        groups.setdefault(owner + kind, []).append(parameter)
    for parameters in groups.values():
        parameters.sort(key=lambda parameter: parameter.numel() % 8 != 0)
    return groups


def create_moments(zero: Any, stage: nn.Module, config: RunConfig, grid: ParallelGrid) -> None:
    """Make all moments (zero) before the first step and tell DeepSpeed of them.

    Left to itself DeepSpeed (0.19.8) looks for them after the first *group* has stepped and never finds
    those of the others.

    Args:
        zero: DeepSpeed's ZeRO optimizer around :func:`build_optimizer`'s.
        stage: the module whose parameters it holds.
        config: the run's configuration.
        grid: this process's place.
    """
    base = zero.optimizer
    if isinstance(base, ShardedAdafactor):
        names = {parameter: name for name, parameter in stage.named_parameters()}
        fragments = {
            group: [locate(names[parameter], parameter, grid.tensor) for parameter in parameters]
            for group, parameters in _groups(stage, config).items()
        }
        base.place(fragments)
    else:
        cuts_parameters = config.parallel.zero_stage == 3
        pieces = "fp32_partitioned_groups_flat" if cuts_parameters else "single_partition_of_fp32_groups"
        for piece in getattr(zero, pieces):
            steps = torch.zeros((), device=piece.device if base.defaults["fused"] else "cpu")
            base.state[piece] = {"step": steps, **{name: torch.zeros_like(piece) for name in ADAM_MOMENTS}}
    if config.parallel.zero_stage != 3:  # which looks for them where it needs them
        zero._lazy_init_hp_params_optimizer_state()


def updates_done(zero: Any) -> int:
    """Updates the optimizer has done, by its own count (bias correction uses it)."""
    (count,) = {int(state["step"]) for state in zero.optimizer.state.values()}
    return count


def set_updates_done(zero: Any, updates: int) -> None:
    """Set the optimizer's own count of updates."""
    for state in zero.optimizer.state.values():
        state["step"].fill_(updates)
