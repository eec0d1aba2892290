"""Parameters, and floating-point operations of a training step: as if dense, and as executed.

A multiply and an add are two operations; backward costs twice forward. Attention counts the causal half.
Routers, norms and activations are left out (well under a percent).
"""

from collections.abc import Mapping

from skipmega.config import RunConfig
from skipmega.routing.router import Router


def layer_flops(config: RunConfig, density: float) -> float:
    """Forward operations of one routed layer per token, at the mean position of a sequence.

    Args:
        config: the run's configuration.
        density: share of tokens that execute what ``routing.wrap`` wraps; 1 for a dense layer.
    """
    model, routing, length = config.model, config.routing, config.data.sequence_length
    hidden, heads = model.hidden_size, model.num_attention_heads * model.head_size
    matrices = 3 if model.activation == "swiglu" else 2
    among = length if routing.keys_values == "all" else density * length
    keys_values = 2 * hidden * 2 * model.kv_heads * model.head_size
    queries = 2 * hidden * 2 * heads + 2 * 2 * heads * (among + 1) / 2
    mlp = matrices * 2 * hidden * model.ffn_size
    shares = {"layer": (density, density), "attention": (density, 1.0), "mlp": (1.0, density)}
    of_queries, of_mlp = shares[routing.wrap]
    of_keys = of_queries if routing.keys_values == "executed" else 1.0
    return of_keys * keys_values + of_queries * queries + of_mlp * mlp


def forward_flops_per_token(config: RunConfig, shares: Mapping[int, float]) -> float:
    """Forward operations of one token at the mean position of a sequence.

    Args:
        config: the run's configuration, vocabulary resolved.
        shares: share of tokens that each routed layer computes; layers left out are dense.
    """
    layers = sum(layer_flops(config, shares.get(layer, 1.0)) for layer in range(config.model.num_layers))
    return layers + 2 * config.model.hidden_size * config.vocab_size


def training_flops_per_token(config: RunConfig, shares: Mapping[int, float] | None = None) -> float:
    """Forward and backward operations of one token; ``shares`` of routed layers, None as if dense."""
    return 3 * forward_flops_per_token(config, shares or {})


def target_shares(config: RunConfig) -> dict[int, float]:
    """Share of tokens that each routed layer computes when it meets its target density."""
    if config.routing.computes_all:
        return dict.fromkeys(config.routed_layers, 1.0)
    return config.densities


def count_parameters(config: RunConfig) -> int:
    """Number of weights of the whole model, a tied embedding counted once."""
    model, routing = config.model, config.routing
    heads, kv_heads = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    matrices = 3 if model.activation == "swiglu" else 2
    layer = model.hidden_size * (2 * heads + 2 * kv_heads + matrices * model.ffn_size + 2)
    embeddings = (1 if model.tie_embeddings else 2) * config.vocab_size * model.hidden_size
    routers = len(config.routed_layers) * Router.parameter_count(routing, model.hidden_size)
    return model.num_layers * layer + routers + embeddings + model.hidden_size
