"""Hugging Face configuration of a skipmega decoder. Exports carry this file, so it imports no skipmega."""

from typing import Any

from transformers import PretrainedConfig

_WORDS = {
    "router": (
        "gumbel",
        "sigmoid",
        "quantile",
        "topk",
        "random",
        "fixed_input",
        "highway",
        "never",
        "always",
    ),
    "router_input": ("normed", "raw"),
    "wrap": ("layer", "mlp", "attention"),
    "update_weight": ("straight_through", "score", "twice_score"),
}


class SkipmegaConfig(PretrainedConfig):
    """Shape of a decoder in which some layers are skipped per token (SkipLayer, arXiv 2311.15436).

    Args:
        vocab_size: rows of the embedding; padded, so it can exceed the tokenizer's number of ids.
        num_key_value_heads: left out, every query head has its own key/value head.
        head_dim: left out, ``hidden_size // num_attention_heads``.
        hidden_act: activation of the feed-forward network, by its transformers name.
        gated_mlp: ``down(act(gate(x)) * up(x))`` if true, else ``down(act(up(x)))``.
        routed_layers: 0-based indices of the layers that have a router; the others run for every token.
        router: how they decide. ``gumbel`` (two logits, the score is their difference), ``sigmoid``,
            ``quantile`` and ``topk`` (one logit): executes where the score exceeds the threshold; ``random``
            and ``fixed_input``: where a constant plus noise of layer and position does; ``highway``: always;
            ``never``: never; ``always``: no layer has a router.
        router_thresholds: one per routed layer, in ascending order of layers; left out, all are 0. Higher
            ones let fewer tokens in.
        router_bias: whether logits have a bias.
        router_predictor: compare the logit of a small network of its own, instead of the score, with the
            threshold.
        router_input: what routers read: the ``normed`` or the ``raw`` hidden state.
        router_temperature: divides the score's margin over the threshold where ``gumbel`` and ``sigmoid``
            weight updates by it.
        router_seed: of the noise of ``random`` and ``fixed_input``.
        wrap: what tokens skip: the ``layer``, its ``mlp`` or its ``attention``.
        update_weight: updates are multiplied by 1 (``straight_through``), by the probability of executing
            (``score``) or by twice that (``twice_score``).
        max_position_embeddings: the sequence length of training; no tensor is sized by it.

    Raises:
        ValueError: ``routed_layers`` names a layer that does not exist, ``router_thresholds`` has another
            number of entries, or one of the words is none of those above.
    """

    model_type = "skipmega"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - the base class's own declaration

    def __init__(
        self,
        vocab_size: int = 32_000,
        hidden_size: int = 768,
        intermediate_size: int = 6144,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "gelu_pytorch_tanh",
        gated_mlp: bool = False,
        routed_layers: list[int] | None = None,
        router: str = "gumbel",
        router_thresholds: list[float] | None = None,
        router_bias: bool = False,
        router_predictor: bool = False,
        router_input: str = "normed",
        router_temperature: float = 1.0,
        router_seed: int = 0,
        wrap: str = "layer",
        update_weight: str = "straight_through",
        max_position_embeddings: int = 1024,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10_000.0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.gated_mlp = gated_mlp
        self.routed_layers = sorted(routed_layers or [])
        self.router = router
        self.router_thresholds = (
            [0.0] * len(self.routed_layers) if router_thresholds is None else list(router_thresholds)
        )
        self.router_bias = router_bias
        self.router_predictor = router_predictor
        self.router_input = router_input
        self.router_temperature = router_temperature
        self.router_seed = router_seed
        self.wrap = wrap
        self.update_weight = update_weight
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        outside = [layer for layer in self.routed_layers if not 0 <= layer < num_hidden_layers]
        if outside:
            raise ValueError(
                f"routed_layers={outside} lie outside the {num_hidden_layers} layers of the model "
                f"(0 to {num_hidden_layers - 1})"
            )
        if self.router == "always" and self.routed_layers:
            raise ValueError(
                f"router='always' routes no layer, routed_layers={self.routed_layers} must be empty"
            )
        if len(self.router_thresholds) != len(self.routed_layers):
            raise ValueError(
                f"router_thresholds has {len(self.router_thresholds)} entries, routed_layers "
                f"{len(self.routed_layers)}: give one threshold per routed layer"
            )
        for name, allowed in _WORDS.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(allowed)}")
        super().__init__(**kwargs)
