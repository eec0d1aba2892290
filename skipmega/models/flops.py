"""Parameters, and floating-point operations of a training step: as if dense, and as executed.

A multiply and an add are two operations; backward costs twice forward. Attention counts the causal half.
Routers, norms and activations are left out (well under a percent).
"""

from collections.abc import Mapping
from typing import NamedTuple

from skipmega.config import RunConfig
from skipmega.errors import ConfigError
from skipmega.routing.plan import group_capacity
from skipmega.routing.router import Router


class LayerParts(NamedTuple):
    """A number for each part of a layer: those that make keys and values, that ask (query and output
    projections), and the feed-forward network."""

    keys_values: float
    queries: float
    mlp: float


def matrix_parameters(config: RunConfig) -> LayerParts:
    """Weights of one layer's matrices."""
    model = config.model
    heads, kv_heads = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    matrices = 3 if model.activation == "swiglu" else 2
    return LayerParts(
        keys_values=2 * model.hidden_size * kv_heads,
        queries=2 * model.hidden_size * heads,
        mlp=matrices * model.hidden_size * model.ffn_size,
    )


def part_shares(config: RunConfig, density: float) -> LayerParts:
    """Share of tokens that each part of a routed layer computes.

    Args:
        config: the run's configuration.
        density: share of tokens that execute what ``routing.wrap`` wraps.
    """
    routing = config.routing
    shares = {"layer": (density, density), "attention": (density, 1.0), "mlp": (1.0, density)}
    of_queries, of_mlp = shares[routing.wrap]
    return LayerParts(of_queries if routing.keys_values == "executed" else 1.0, of_queries, of_mlp)


def layer_flops(config: RunConfig, density: float) -> float:
    """Forward operations of one routed layer per token, at the mean position of a sequence.

    Args:
        config: the run's configuration.
        density: share of tokens that execute what ``routing.wrap`` wraps; 1 for a dense layer.
    """
    model, length = config.model, config.data.sequence_length
    among = length if config.routing.keys_values == "all" else density * length
    scores_and_values = 2 * 2 * model.num_attention_heads * model.head_size * (among + 1) / 2
    weights, shares = matrix_parameters(config), part_shares(config, density)
    products = sum(2 * count * share for count, share in zip(weights, shares, strict=True))
    return products + shares.queries * scores_and_values


def forward_flops_per_token(config: RunConfig, shares: Mapping[int, float]) -> float:
    """Forward operations of one token at the mean position of a sequence.

    Args:
        config: the run's configuration, vocabulary resolved.
        shares: share of tokens that each routed layer computes; layers left out are dense.
    """
    layers = sum(layer_flops(config, shares.get(layer, 1.0)) for layer in range(config.model.num_layers))
    return layers + head_flops(config)


def head_flops(config: RunConfig) -> float:
    """Forward operations of the language-model head per token."""
    return 2 * config.model.hidden_size * config.vocab_size


def training_flops_per_token(config: RunConfig, shares: Mapping[int, float] | None = None) -> float:
    """Forward and backward operations of one token; ``shares`` of routed layers, None as if dense."""
    return 3 * forward_flops_per_token(config, shares or {})


def target_shares(config: RunConfig) -> dict[int, float]:
    """Share of tokens that each routed layer computes when it meets its target density."""
    if config.routing.computes_all:
        return dict.fromkeys(config.routed_layers, 1.0)
    return config.densities


def density_for_flops(config: RunConfig, target_forward_flops_per_token: float) -> float:
    """The uniform ``routing.density`` at which the executed operations are those wanted.

    Args:
        config: the run's configuration, vocabulary resolved; its own density does not matter.
        target_forward_flops_per_token: forward operations of one token, head included.

    Raises:
        ConfigError: the density changes nothing, or none in (0, 1] gives the target.
    """
    routing = config.routing
    if routing.computes_all or routing.router == "never" or not config.routed_layers:
        raise ConfigError(
            f"routing.router={routing.router}, routing.gradient={routing.gradient} executes the same "
            "operations at any routing.density: choose a router that skips, with gradient=packed"
        )

    def executed(density: float) -> float:
        return forward_flops_per_token(config, dict.fromkeys(config.routed_layers, density))

    least, most = executed(0.0), executed(1.0)
    if not least < target_forward_flops_per_token <= most:
        raise ConfigError(
            f"no routing.density gives {target_forward_flops_per_token:.6g} forward operations per token: "
            f"with model.num_layers={config.model.num_layers}, {len(config.routed_layers)} of them routed, "
            f"they are {least:.6g} (density 0, not included) to {most:.6g} (density 1); change the depth, "
            "the widths or model.num_key_value_heads"
        )
    below, above = 0.0, 1.0
    while (middle := (below + above) / 2) not in (below, above):
        below, above = (
            (middle, above) if executed(middle) < target_forward_flops_per_token else (below, middle)
        )
    return above


def count_parameters(config: RunConfig) -> int:
    """Number of weights of the whole model, a tied embedding counted once."""
    layers = sum(layer_parameters(config, layer) for layer in range(config.model.num_layers))
    return layers + embedding_parameters(config) + config.model.hidden_size


def layer_parameters(config: RunConfig, layer: int) -> int:
    """Number of weights of decoder layer ``layer`` (0-based), its router included."""
    hidden = config.model.hidden_size
    router = Router.parameter_count(config.routing, hidden) if config.layer_is_routed(layer) else 0
    return int(sum(matrix_parameters(config))) + 2 * hidden + router


def embedding_parameters(config: RunConfig) -> int:
    """Number of weights of the embedding and, unless it is tied to it, of the head."""
    return (1 if config.model.tie_embeddings else 2) * config.vocab_size * config.model.hidden_size


def active_parameters(config: RunConfig, shares: Mapping[int, float]) -> float:
    """Mean number of weights that a token meets, embeddings, norms and routers included.

    Args:
        config: the run's configuration, vocabulary resolved.
        shares: share of tokens that each routed layer computes; layers left out are dense.
    """
    weights = matrix_parameters(config)
    idle = 0.0
    for share in shares.values():
        met = part_shares(config, share)
        idle += sum(count * (1 - part) for count, part in zip(weights, met, strict=True))
    return count_parameters(config) - idle


def computed_share(config: RunConfig, layer: int) -> float:
    """Rows that a layer computes in training over tokens, padding included, when there are most of them."""
    routing = config.routing
    density = config.densities.get(layer)
    if density is None or routing.computes_all or routing.density_warmup_steps:
        return 1.0
    factor = 1.0 if routing.router == "topk" else routing.capacity_factor
    if factor is None:
        return density
    group = routing.group_size or config.data.sequence_length
    return group_capacity(factor, density, group, routing.min_capacity) / group
