"""A decoder whose layers are skipped per token, for transformers >= 5 (SkipLayer, arXiv 2311.15436).

Exports carry this file, so it imports torch, transformers and its configuration only. It runs the model as
evaluation does: a router compares a score with its layer's threshold, without noise and without a capacity
limit; routers that do not read the token draw a coin that depends on layer and position alone. Where a token
does not execute, its hidden state passes unchanged. Keys and values are made from every token, so each
layer's cache has the length of the sequence and later tokens attend to skipped ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_skipmega import SkipmegaConfig

Rotary = tuple[Tensor, Tensor]


@dataclass
class SkipmegaModelOutput(ModelOutput):
    """Output of :class:`SkipmegaModel`.

    ``last_hidden_state`` [b, s, h]; ``hidden_states`` (on request): the embeddings, then each layer's output
    [b, s, h], the last one after the final norm; ``executed`` (on request): one bool [b, s] per layer, true
    where the token ran the layer, or that half of it that may be skipped (padding tokens are routed like any
    other).
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    executed: tuple[Tensor, ...] | None = None


@dataclass
class SkipmegaCausalLMOutput(ModelOutput):
    """Output of :class:`SkipmegaForCausalLM`.

    ``loss`` (with labels): a scalar; ``logits`` [b, kept, V]; the rest as in :class:`SkipmegaModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    executed: tuple[Tensor, ...] | None = None


class SkipmegaRMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., h] to [..., h], same dtype."""
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> Rotary:
    """Cosines and sines of rotary positions in the half-split layout.

    The frequencies are made anew in each forward pass (``head_dim / 2`` numbers): a buffer that no checkpoint
    holds would have to survive the construction on the meta device in ``from_pretrained``.

    Args:
        positions: integers [b or 1, s].

    Returns:
        cosines and sines, each fp32 [b or 1, 1, s, head_dim / 2].
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """Turn ``heads`` [b, heads, s, head_dim] to their positions, in fp32; same shape and dtype."""
    cosine, sine = rotary
    first, second = heads.float().chunk(2, dim=-1)
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return turned.to(heads.dtype)


def eager_attention(
    module: "SkipmegaAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain torch, with the signature of ``ALL_ATTENTION_FUNCTIONS``.

    Args:
        query: [b, query heads, s, d].
        key: [b, key/value heads, total, d]; ``value`` alike.
        attention_mask: added to the scores, [b, 1, s, total].

    Returns:
        the context [b, s, query heads, d] and the weights [b, query heads, s, total].
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class SkipmegaAttention(nn.Module):
    """Causal grouped-query attention in three steps, so that a skipped token pays only for the first."""

    def __init__(self, config: SkipmegaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        query_width = config.num_attention_heads * self.head_dim
        key_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def keys_and_values(self, normed: Tensor, rotary: Rotary, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Keys and values [b, key/value heads, total, d] of the cached tokens and of ``normed`` [b, s, h]."""
        key = rotate(self._split_heads(self.k_proj(normed)), rotary)
        value = self._split_heads(self.v_proj(normed))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        return key, value

    def forward(
        self, normed: Tensor, key: Tensor, value: Tensor, rotary: Rotary, mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """What each token of ``normed`` [b, s, h] reads, [b, s, query heads * d], before ``o_proj``."""
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        query = rotate(self._split_heads(self.q_proj(normed)), rotary)
        context, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return context.flatten(2)

    def _split_heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class SkipmegaMLP(nn.Module):
    """The feed-forward network, [..., h] to [..., h]."""

    def __init__(self, config: SkipmegaConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.gate_proj: nn.Linear | None = None
        if config.gated_mlp:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        up = self.up_proj(hidden)
        inner = self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(hidden)) * up
        return self.down_proj(inner)


class SkipmegaPredictor(nn.Module):
    """Predicts from the token alone whether it is among the best of its sequence."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        width = max(16, hidden_size // 4)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, 1, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, s, h] to fp32 logits [b, s], whatever the dtype."""
        inner = F.gelu(F.linear(tokens.float(), self.up_proj.weight.float()), approximate="tanh")
        return F.linear(inner, self.down_proj.weight.float()).squeeze(-1)


class SkipmegaRouter(nn.Module):
    """Decides which tokens execute a layer, and what their updates are multiplied by.

    ``weight`` is [2, h] for ``gumbel`` (rows: the skip logit, the execute logit; the score is their
    difference), [1, h] for the others that read the token, and None for those that do not; ``bias`` has as
    many entries as there are logits.
    """

    def __init__(self, config: SkipmegaConfig, layer_idx: int) -> None:
        super().__init__()
        self.kind = config.router
        self.threshold = config.router_thresholds[config.routed_layers.index(layer_idx)]
        self.temperature = config.router_temperature
        self.update_weight = config.update_weight
        self.seed, self.layer_idx = config.router_seed, layer_idx
        self.draws = self.kind in ("random", "fixed_input")
        logits, reads = 2 if self.kind == "gumbel" else 1, not self.draws and self.kind != "never"
        self.weight = nn.Parameter(torch.zeros(logits, config.hidden_size)) if reads else None
        self.bias = nn.Parameter(torch.zeros(logits)) if config.router_bias else None
        self.predictor = SkipmegaPredictor(config.hidden_size) if config.router_predictor else None

    def forward(self, tokens: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Decide for each token, in fp32 whatever the dtype.

        Args:
            tokens: [b, s, h], the normed or raw hidden states.
            position_ids: [b or 1, s].

        Returns:
            bool [b, s], and the updates' weights, fp32 [b, s]; None: all are 1.
        """
        logits = self._logits(tokens)
        score = logits[..., -1] - logits[..., 0] if self.kind == "gumbel" else logits[..., 0]
        margin = (score if self.predictor is None else self.predictor(tokens)) - self.threshold
        if self.draws:
            margin = margin + logistic_noise(self.seed, self.layer_idx, position_ids)
        executed = margin > 0
        if self.kind in ("highway", "never"):
            executed = torch.full_like(executed, self.kind == "highway")
        if self.update_weight == "straight_through":
            return executed, None
        soft = self.kind in ("gumbel", "sigmoid")
        weight = torch.sigmoid(margin / self.temperature if soft else score)
        return executed, 2 * weight if self.update_weight == "twice_score" else weight

    def _logits(self, tokens: Tensor) -> Tensor:
        """[b, s, 1 or 2]."""
        bias = None if self.bias is None else self.bias.float()
        if self.weight is not None:
            return F.linear(tokens.float(), self.weight.float(), bias)
        constant = tokens.new_zeros((*tokens.shape[:2], 1), dtype=torch.float32)
        return constant if bias is None else constant + bias


def logistic_noise(seed: int, layer: int, position_ids: Tensor) -> Tensor:
    """Logistic noise as a function of seed, layer and position, so that a cache changes no decision.

    The integers are 32-bit words; in training every sequence has its own noise, evaluation is its sequence 0.

    Args:
        position_ids: [b or 1, s].

    Returns:
        fp32 [b or 1, s].
    """
    stream = _mix(_mix(_mix(seed * 0x9E3779B1 + layer * 0x85EBCA77)))
    bits = _mix(_mix(position_ids.long() ^ stream) + stream)
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    return uniform.log() - torch.log1p(-uniform)


def _mix(x: Any) -> Any:
    """A 32-bit finaliser (Wellons' lowbias32) on an integer or an int64 tensor."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


class SkipmegaDecoderLayer(nn.Module):
    """A pre-norm decoder layer; with a router, it or one half of it runs only for the tokens let in."""

    def __init__(self, config: SkipmegaConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = SkipmegaAttention(config, layer_idx)
        self.mlp = SkipmegaMLP(config)
        self.input_layernorm = SkipmegaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = SkipmegaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.router = SkipmegaRouter(config, layer_idx) if layer_idx in config.routed_layers else None
        self.wrap, self.router_input = config.wrap, config.router_input

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        rotary: Rotary,
        mask: Tensor | None,
        cache: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """The new hidden states [b, s, h], and who executed what may be skipped: bool [b, s]."""
        normed = self.input_layernorm(hidden)
        key, value = self.self_attn.keys_and_values(normed, rotary, cache)

        def attend() -> Tensor:
            return self.self_attn(normed, key, value, rotary, mask, **kwargs)

        if self.router is None:
            hidden = hidden + self.self_attn.o_proj(attend())
            hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
            return hidden, hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
        if self.wrap == "mlp":
            hidden = hidden + self.self_attn.o_proj(attend())
            normed = self.post_attention_layernorm(hidden)
        executed, weight = self.router(hidden if self.router_input == "raw" else normed, position_ids)
        rows = executed.flatten().nonzero().squeeze(-1)
        if rows.numel() > 0:
            flat = hidden.flatten(0, 1)
            packed = flat[rows]
            update = self._update(packed, lambda: attend().flatten(0, 1)[rows])
            if weight is not None:
                update = update * weight.flatten()[rows, None].to(update.dtype)
            hidden = flat.index_copy(0, rows, packed + update).view_as(hidden)
        if self.wrap == "attention":
            hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return hidden, executed

    def _update(self, packed: Tensor, attend: Callable[[], Tensor]) -> Tensor:
        """What is added to ``packed`` [n, h]; ``attend`` gives what its tokens read, [n, query heads * d]."""
        if self.wrap == "mlp":
            return self.mlp(self.post_attention_layernorm(packed))
        attended = self.self_attn.o_proj(attend())
        if self.wrap == "attention":
            return attended
        return attended + self.mlp(self.post_attention_layernorm(packed + attended))


class SkipmegaPreTrainedModel(PreTrainedModel):
    """What transformers must know of the model classes."""

    config_class = SkipmegaConfig
    base_model_prefix = "model"
    _no_split_modules = ["SkipmegaDecoderLayer"]  # noqa: RUF012 - the base class's own declaration
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SkipmegaRouter) and module.weight is not None:
            init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, SkipmegaRouter) and module.bias is not None:
            init.zeros_(module.bias)


class SkipmegaModel(SkipmegaPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: SkipmegaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [SkipmegaDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = SkipmegaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_execution: bool = False,
        **kwargs: Any,
    ) -> SkipmegaModelOutput:
        """Run all layers.

        Args:
            input_ids: token ids [b, s]; or give ``inputs_embeds`` [b, s, h].
            attention_mask: 1 for tokens, 0 for padding, [b, cached + s].
            position_ids: [b or 1, s]; left out, they count on from the cached tokens.
            output_execution: also return which tokens executed which layer.

        Raises:
            ValueError: both or neither of ``input_ids`` and ``inputs_embeds``.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = rotary_table(position_ids, self.config.head_dim, self.config.rope_theta)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states: list[Tensor] = []
        executions: list[Tensor] = []
        for layer in self.layers:
            if output_hidden_states:
                states.append(hidden)
            hidden, executed = layer(
                hidden, position_ids=position_ids, rotary=rotary, mask=mask, cache=past_key_values, **kwargs
            )
            executions.append(executed)
        hidden = self.norm(hidden)
        return SkipmegaModelOutput(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            executed=tuple(executions) if output_execution else None,
        )


class SkipmegaForCausalLM(SkipmegaPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SkipmegaConfig) -> None:
        super().__init__(config)
        self.model = SkipmegaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_execution: bool = False,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> SkipmegaCausalLMOutput:
        """Logits, and with ``labels`` the loss.

        Args:
            labels: token ids [b, s], shifted inside, -100 where no loss is wanted. Routing is hard: gradients
                reach the routers through the weights of the updates only, if those are scores.
            logits_to_keep: compute only the last so many positions (0: all), or those of an index [kept].

        The other arguments are those of :meth:`SkipmegaModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_execution=output_execution,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return SkipmegaCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            executed=outputs.executed,
        )
