"""Floating-point operations of a training step: as if dense, and as executed.

A multiply and an add are two operations; backward costs twice forward. Attention counts the causal half.
Routers, norms and activations are left out (well under a percent).
"""

from skipmega.config import ModelConfig, RunConfig


def forward_flops_per_token(model: ModelConfig, vocab_size: int, length: int, densities: list[float]) -> float:
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
