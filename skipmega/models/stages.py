"""Cutting the layers into pipeline stages of equal cost.

A stage's cost is its forward operations as computed (packed rows, padding included) and, on the last one, the
head's. Checkpoints are logical, so a run resumes under any cut.
"""

from itertools import pairwise

from skipmega.config import RunConfig
from skipmega.errors import ConfigError
from skipmega.models.flops import computed_share, head_flops, layer_flops


def cut_stages(config: RunConfig) -> list[list[range]]:
    """Global layer numbers of every stage's chunks: by ``parallel.layers_per_stage``, or by the cut whose
    dearest chunk is cheapest (of several such, the one with the earliest cuts).

    Raises:
        ConfigError: ``layers_per_stage`` does not fit, there are fewer layers than chunks, or a stage lacks a
            routed layer that ``routing.router_learning_rate`` needs.
    """
    parallel, layers = config.parallel, config.model.num_layers
    given, stages = parallel.layers_per_stage, parallel.pipeline_parallel
    chunks, fields = stages * parallel.chunks_per_stage, "parallel.pipeline_parallel"
    if parallel.chunks_per_stage > 1:
        fields += " x parallel.chunks_per_stage"
    if given is not None and (len(given) != chunks or sum(given) != layers):
        raise ConfigError(
            f"parallel.layers_per_stage={given} is not {chunks} numbers ({fields}) that add up to {layers} "
            "(model.num_layers): mend it, or leave it out for a cut by cost"
        )
    if layers < chunks:
        raise ConfigError(
            f"model.num_layers={layers} are fewer than {fields}={chunks}: each needs a layer, so use at most "
            f"{layers}"
        )
    ends = _cheapest_ends(config, chunks) if given is None else [sum(given[: i + 1]) for i in range(chunks)]
    in_order = [range(first, end) for first, end in pairwise([0, *ends])]
    cut = [in_order[stage::stages] for stage in range(stages)]
    _check_routers(config, cut)
    return cut


def stage_costs(config: RunConfig) -> list[float]:
    """Forward operations per token of every stage."""
    costs = [
        sum(_layer_cost(config, layer) for layers in chunks for layer in layers)
        for chunks in cut_stages(config)
    ]
    costs[-1] += head_flops(config)
    return costs


def _cheapest_ends(config: RunConfig, stages: int) -> list[int]:
    """Where each of ``stages`` cuts ends, by dynamic programming over (cuts left, first layer)."""
    layers = config.model.num_layers
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


def _check_routers(config: RunConfig, cut: list[list[range]]) -> None:
    rate, routed = config.routing.router_learning_rate, set(config.routed_layers)
    idle = [stage for stage, chunks in enumerate(cut) if not any(routed.intersection(c) for c in chunks)]
    if rate != 1.0 and routed and idle:
        layers = ", ".join(f"{chunk.start} to {chunk.stop - 1}" for chunk in cut[idle[0]])
        raise ConfigError(
            f"routing.router_learning_rate={rate} needs a routed layer on every pipeline stage, and stage "
            f"{idle[0]} of {len(cut)} (layers {layers}) has none: set it to 1, route other layers, or give "
            "parallel.layers_per_stage"
        )
