"""The evaluation semantics of a skipmega decoder, token by token in float64, and models to try it on."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipmega.config import RunConfig, build_config
from skipmega.hf import native_to_hf_names, to_hf_config, to_hf_state, write_export
from skipmega.hf.modeling_skipmega import SkipmegaForCausalLM
from skipmega.routing.state import RoutingState

MODEL = {
    "num_layers": 5,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "ffn_hidden_size": 40,
    "vocab_size": 64,
}


def make_config(routing: Mapping[str, Any] | None = None, **model: Any) -> RunConfig:
    """A small run with the given fields of its model and routing sections."""
    values = {
        "model": {**MODEL, **model},
        "routing": {"router": "gumbel", **(routing or {})},
        "data": {"sequence_length": 32},
    }
    return build_config(values, source="the test")


def random_state(config: RunConfig, seed: int = 0) -> dict[str, Tensor]:
    """Native fp32 tensors, large enough for logits of order one and routers of either mind."""
    generator = torch.Generator().manual_seed(seed)
    shapes = SkipmegaForCausalLM(to_hf_config(config)).state_dict()
    state = {}
    for native, hf in native_to_hf_names(config).items():
        shape = shapes[hf].shape
        values = torch.randn(shape, generator=generator)
        matrix = len(shape) == 2 or native.endswith("bias")
        state[native] = 1.5 * values / math.sqrt(shape[-1]) if matrix else 1 + 0.3 * values
    return state


def build_model(
    config: RunConfig,
    state: Mapping[str, Tensor],
    attention: str = "sdpa",
    routing: RoutingState | None = None,
    step: int = 0,
) -> SkipmegaForCausalLM:
    """The Hugging Face model with the given native tensors, in evaluation mode."""
    hf_config = to_hf_config(config, routing, step)
    hf_config._attn_implementation = attention
    model = SkipmegaForCausalLM(hf_config)
    result = model.load_state_dict(to_hf_state(state, config), strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}
    return model.eval()


def export(
    out: Path, config: RunConfig, state: Mapping[str, Tensor], tokenizer: str | Path | None = None, **how: Any
) -> Path:
    """An export of the given native tensors, routers as in an untrained model."""
    routing = RoutingState(config, config.routed_layers, torch.device("cpu"))
    return write_export(out, config, state, tokenizer, routing, 0, **how)


def reference(config: RunConfig, state: Mapping[str, Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [b, s, V] in float64, and who executed which layer, bool [layers, b, s]."""
    weights = {name: tensor.double() for name, tensor in state.items()}
    logits, executed = zip(*(_one_sequence(config, weights, row) for row in tokens), strict=True)
    return torch.stack(logits), torch.stack(executed, dim=1)


def _one_sequence(config: RunConfig, weights: dict[str, Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
    stream = [weights["embedding.weight"][token] for token in tokens]
    executed = torch.ones(config.model.num_layers, len(stream), dtype=torch.bool)
    for layer in range(config.model.num_layers):
        prefix = f"layers.{layer}."
        here = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
        normed = [_norm(x, here["attention_norm.weight"], config) for x in stream]
        if "router.weight" in here:
            decisions = [(here["router.weight"] @ n).tolist() for n in normed]
            executed[layer] = torch.tensor([execute > skip for skip, execute in decisions])
        stream = [
            _execute(config, here, x, normed[: position + 1]) if executed[layer, position] else x
            for position, x in enumerate(stream)
        ]
    head = weights["embedding.weight" if config.model.tie_embeddings else "head.weight"]
    return torch.stack([head @ _norm(x, weights["final_norm.weight"], config) for x in stream]), executed


def _execute(config: RunConfig, here: dict[str, Tensor], x: Tensor, normed: list[Tensor]) -> Tensor:
    """What the layer makes of the last of ``normed``'s tokens, whose residual is ``x``."""
    model = config.model
    heads = []
    for head in range(model.num_attention_heads):
        shared = head // (model.num_attention_heads // model.kv_heads)
        query = _rotate(
            _head(here["attention.query.weight"], head, model.head_size) @ normed[-1], len(normed) - 1, config
        )
        keys = [
            _rotate(_head(here["attention.key.weight"], shared, model.head_size) @ n, position, config)
            for position, n in enumerate(normed)
        ]
        values = [_head(here["attention.value.weight"], shared, model.head_size) @ n for n in normed]
        scores = torch.stack([query @ key for key in keys]) / math.sqrt(model.head_size)
        heads.append(scores.softmax(0) @ torch.stack(values))
    x = x + here["attention.output.weight"] @ torch.cat(heads)
    z = _norm(x, here["mlp_norm.weight"], config)
    up = here["mlp.up.weight"] @ z
    if model.activation == "swiglu":
        gate = here["mlp.gate.weight"] @ z
        inner = gate / (1 + torch.exp(-gate)) * up
    else:
        inner = up * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    return x + here["mlp.down.weight"] @ inner


def _norm(x: Tensor, weight: Tensor, config: RunConfig) -> Tensor:
    return x / torch.sqrt((x * x).mean() + config.model.norm_epsilon) * weight


def _head(weight: Tensor, head: int, size: int) -> Tensor:
    return weight[head * size : (head + 1) * size]


def _rotate(vector: Tensor, position: int, config: RunConfig) -> Tensor:
    """Turn the pairs (i, i + d/2) of one head's vector."""
    half = len(vector) // 2
    turned = vector.clone()
    for i in range(half):
        angle = position * config.model.rope_theta ** (-i / half)
        a, b = vector[i], vector[i + half]
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return turned
