"""A decoder whose layers are skipped per token, for transformers >= 5 (SkipLayer, arXiv 2311.15436).

Exports carry this file, so it imports torch, transformers and its configuration only. It runs the
deterministic model: no router noise, no capacity limit. In a routed layer a token executes if its execute
logit is greater than its skip logit; otherwise its hidden state passes unchanged. Keys and values are made
from every token, so each layer's cache has the length of the sequence and later tokens attend to skipped
ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
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
    where the token ran the layer (padding tokens are routed like any other).
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


class SkipmegaRouter(nn.Linear):
    """Decides which tokens execute a layer. Weight row 0 gives the skip logit, row 1 the execute logit."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 2, bias=False)

    def forward(self, normed: Tensor) -> Tensor:
        """Bool [b, s] from the normed hidden states [b, s, h]; the logits are fp32 whatever the dtype."""
        skip, execute = F.linear(normed.float(), self.weight.float()).unbind(-1)
        return execute > skip


class SkipmegaDecoderLayer(nn.Module):
    """A pre-norm decoder layer; with a router, it runs only for the tokens that the router lets in."""

    def __init__(self, config: SkipmegaConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = SkipmegaAttention(config, layer_idx)
        self.mlp = SkipmegaMLP(config)
        self.input_layernorm = SkipmegaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = SkipmegaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.router = SkipmegaRouter(config.hidden_size) if layer_idx in config.routed_layers else None

    def forward(
        self, hidden: Tensor, rotary: Rotary, mask: Tensor | None, cache: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new hidden states [b, s, h], and where they are new: bool [b, s]."""
        normed = self.input_layernorm(hidden)
        key, value = self.self_attn.keys_and_values(normed, rotary, cache)
        if self.router is None:
            context = self.self_attn(normed, key, value, rotary, mask, **kwargs)
            return self._update(hidden, context), hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
        executed = self.router(normed)
        rows = executed.flatten().nonzero().squeeze(-1)
        if rows.numel() == 0:
            return hidden, executed
        context = self.self_attn(normed, key, value, rotary, mask, **kwargs)
        flat = hidden.flatten(0, 1)
        updated = self._update(flat[rows], context.flatten(0, 1)[rows])
        return flat.index_copy(0, rows, updated).view_as(hidden), executed

    def _update(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Attention output and feed-forward: [..., h] and [..., query heads * d] to [..., h]."""
        hidden = hidden + self.self_attn.o_proj(context)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class SkipmegaPreTrainedModel(PreTrainedModel):
    """What transformers must know of the model classes."""

    config_class = SkipmegaConfig
    base_model_prefix = "model"
    _no_split_modules = ["SkipmegaDecoderLayer"]  # noqa: RUF012 - the base class's own declaration
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


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
            hidden, executed = layer(hidden, rotary=rotary, mask=mask, cache=past_key_values, **kwargs)
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
                reach every parameter but the routers'.
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
