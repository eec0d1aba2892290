"""Cutting the layers into pipeline stages of equal cost.

A stage's cost is its forward operations as computed (packed rows, padding included) and, on the last one, the
head's. Checkpoints are logical, so a run resumes under any cut.
"""

from itertools import pairwise

from skipmega.config import RunConfig
from skipmega.errors import ConfigError
from skipmega.models.flops import computed_share, head_flops, layer_flops


def cut_stages(config: RunConfig) -> list[range]:
    """Global layer numbers of every stage: ``parallel.layers_per_stage``, or the cut whose dearest stage is
    cheapest (of several such, the one with the earliest cuts).

    Raises:
        ConfigError: ``layers_per_stage`` does not fit, there are fewer layers than stages, or a stage lacks a
            routed layer that ``routing.router_learning_rate`` needs.
    """
    given, stages, layers = (
        config.parallel.layers_per_stage,
        config.parallel.pipeline_parallel,
        config.model.num_layers,
    )
    if given is not None and (len(given) != stages or sum(given) != layers):
        raise ConfigError(
            f"parallel.layers_per_stage={given} is not {stages} numbers (parallel.pipeline_parallel) that "
            f"add up to {layers} (model.num_layers): mend it, or leave it out for a cut by cost"
        )
    if layers < stages:
        raise ConfigError(
            f"model.num_layers={layers} are fewer than parallel.pipeline_parallel={stages} stages: use at "
            f"most {layers} stages"
        )
    ends = _cheapest_ends(config) if given is None else [sum(given[: i + 1]) for i in range(stages)]
    cut = [range(first, end) for first, end in pairwise([0, *ends])]
    _check_routers(config, cut)
    return cut


def stage_costs(config: RunConfig) -> list[float]:
    """Forward operations per token of every stage."""
    cut = cut_stages(config)
    costs = [sum(_layer_cost(config, layer) for layer in layers) for layers in cut]
    costs[-1] += head_flops(config)
    return costs


def _cheapest_ends(config: RunConfig) -> list[int]:
    """Where each stage ends, by dynamic programming over (stages left, first layer)."""
    layers, stages = config.model.num_layers, config.parallel.pipeline_parallel
    costs = [_layer_cost(config, layer) for layer in range(layers)]
    costs[-1] += head_flops(config)
    before = [sum(costs[:layer]) for layer in range(layers + 1)]
    # best[first]: cost of the dearest of the stages that hold layers first.., and where they end
    best = {first: (before[layers] - before[first], [layers]) for first in range(layers)}
    for left in range(2, stages + 1):
        best = {
            first: min(
                (max(before[end] - before[first], best[end][0]), [end, *best[end][1]])
                for end in range(first + 1, layers - left + 2)
            )
            for first in range(layers - left + 1)
        }
    return best[0][1]


def _layer_cost(config: RunConfig, layer: int) -> float:
    return layer_flops(config, computed_share(config, layer))


def _check_routers(config: RunConfig, cut: list[range]) -> None:
    rate, routed = config.routing.router_learning_rate, set(config.routed_layers)
    idle = [stage for stage, layers in enumerate(cut) if not routed.intersection(layers)]
    if rate != 1.0 and routed and idle:
        raise ConfigError(
            f"routing.router_learning_rate={rate} needs a routed layer on every pipeline stage, and stage "
            f"{idle[0]} of {len(cut)} (layers {cut[idle[0]].start} to {cut[idle[0]].stop - 1}) has none: set "
            "it to 1, route other layers, or give parallel.layers_per_stage"
        )
