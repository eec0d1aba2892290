"""Rules across sections that hold on any grid."""

from skipmega.config.routing import RoutingConfig
from skipmega.config.run import RunConfig
from skipmega.errors import ConfigError


def check_consistency(config: RunConfig) -> None:
    """Refuse combinations across sections that no grid could run.

    Raises:
        ConfigError: names the fields, the values and the mend.
    """
    routing, model, training = config.routing, config.model, config.training
    if routing.router != "always" and routing.dense_first + routing.dense_last >= model.num_layers:
        raise ConfigError(
            f"routing.dense_first={routing.dense_first} and routing.dense_last={routing.dense_last} leave "
            f"none of model.num_layers={model.num_layers} layers to route: lower them, or set "
            "routing.router=always for a dense model"
        )
    for name, density in (("density", routing.density), ("eval_density", routing.eval_density)):
        if isinstance(density, list) and len(density) != len(config.routed_layers):
            raise ConfigError(
                f"routing.{name} lists {len(density)} shares, but {len(config.routed_layers)} layers are "
                f"routed ({config.routed_layers}): give one per routed layer, one number, or a ramp"
            )
    if routing.density_warmup_steps > training.steps:
        raise ConfigError(
            f"routing.density_warmup_steps={routing.density_warmup_steps} lies beyond training.steps="
            f"{training.steps}: the target density would never be reached; lower it"
        )
    group, length = routing.group_size, config.data.sequence_length
    if group is not None and length % group:
        raise ConfigError(
            f"routing.group_size={group} does not divide data.sequence_length={length}: groups lie within "
            "one sequence, choose a divisor or leave it out for the whole sequence"
        )
    if routing.eval_capacity_factor is not None and group is None:
        raise ConfigError(
            f"routing.eval_capacity_factor={routing.eval_capacity_factor} needs routing.group_size: with "
            "whole sequences as groups the capacity would change with the length of a text; set group_size, "
            "or leave eval_capacity_factor out (dropless)"
        )
    if training.compile and _packs(routing) and routing.capacity_factor is None:
        raise ConfigError(
            "training.compile=true needs fixed shapes, and routing.capacity_factor=null (dropless) has none: "
            "set routing.capacity_factor (1.25, say), or training.compile=false"
        )
    if training.cuda_graphs and not training.compile:
        raise ConfigError("training.cuda_graphs=true captures compiled layers: set training.compile=true too")
    if training.attention == "flash" and training.precision != "bf16":
        raise ConfigError(
            f"training.attention=flash has no kernels for training.precision={training.precision}: set "
            "training.precision=bf16, or leave training.attention at auto"
        )
    if training.stop_after is not None and training.stop_after > training.steps:
        raise ConfigError(
            f"training.stop_after={training.stop_after} lies beyond training.steps={training.steps}: "
            "lower it or leave it out"
        )
    if sum(config.data.split) <= 0 or min(config.data.split) < 0:
        raise ConfigError(f"data.split={config.data.split} must be two weights >= 0 with a positive sum")


def _packs(routing: RoutingConfig) -> bool:
    """Whether the number of packed rows hangs on the capacity (top-k has its own)."""
    return routing.router not in ("always", "topk") and not routing.computes_all
