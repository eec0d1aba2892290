"""Parameters, and floating-point operations of a training step: as if dense, and as executed.

A multiply and an add are two operations; backward costs twice forward. Attention counts the causal half.
Routers, norms and activations are left out (well under a percent).
"""

from skipmega.config import ModelConfig, RunConfig


def forward_flops_per_token(
    model: ModelConfig, vocab_size: int, length: int, densities: list[float]
) -> float:
    """Forward operations of one token at the mean position of a sequence.

    Args:
        model: the decoder's shape.
        vocab_size: padded vocabulary.
        length: tokens of a sequence.
        densities: share of tokens that execute each layer, one per layer; 1 for dense ones.
    """
    hidden, heads = model.hidden_size, model.num_attention_heads * model.head_size
    for_all = 2 * hidden * 2 * model.kv_heads * model.head_size
    matrices = 3 if model.activation == "swiglu" else 2
    projections = 2 * hidden * 2 * heads
    attention = 2 * 2 * heads * (length + 1) / 2
    for_executed = projections + attention + matrices * 2 * hidden * model.ffn_size
    return sum(for_all + density * for_executed for density in densities) + 2 * hidden * vocab_size


def training_flops_per_token(config: RunConfig, densities: list[float] | None = None) -> float:
    """Forward and backward operations of one token; ``densities`` of all layers, None as if dense."""
    layers = config.model.num_layers
    return 3 * forward_flops_per_token(
        config.model, config.vocab_size, config.data.sequence_length, densities or [1.0] * layers
    )


def count_parameters(config: RunConfig) -> int:
    """Number of weights of the whole model, a tied embedding counted once."""
    model = config.model
    heads, kv_heads = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    matrices = 3 if model.activation == "swiglu" else 2
    layer = model.hidden_size * (2 * heads + 2 * kv_heads + matrices * model.ffn_size + 2)
    routers = sum(2 * model.hidden_size for i in range(model.num_layers) if config.layer_is_routed(i))
    embeddings = (1 if model.tie_embeddings else 2) * config.vocab_size * model.hidden_size
    return model.num_layers * layer + routers + embeddings + model.hidden_size
