"""How skipmega's own checkpoints and the Hugging Face model name and shape the same tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from skipmega.config import RoutingConfig, RunConfig
from skipmega.errors import CheckpointError, ConfigError
from skipmega.hf.configuration_skipmega import SkipmegaConfig
from skipmega.hf.modeling_skipmega import SkipmegaForCausalLM
from skipmega.routing.router import Router
from skipmega.routing.state import RoutingState

_LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
_GATE_NAME = {"mlp.gate.weight": "mlp.gate_proj.weight"}
_ROUTER_NAMES = {
    "router.weight": "router.weight",
    "router.bias": "router.bias",
    "router.predictor.up": "router.predictor.up_proj.weight",
    "router.predictor.down": "router.predictor.down_proj.weight",
}
_MODEL_NAMES = {"embedding.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"}
_HEAD_NAME = {"head.weight": "lm_head.weight"}


def to_hf_config(config: RunConfig, routing: RoutingState | None = None, step: int = 0) -> SkipmegaConfig:
    """The Hugging Face configuration of a run's model (special token ids are the tokenizer's to add).

    Args:
        config: the run's configuration, with the vocabulary resolved.
        routing: the state of all routed layers, which gives the thresholds; left out, an untrained one.
        step: optimizer steps done, which give the temperature.

    Raises:
        ConfigError: the model has no Hugging Face form.
    """
    model, given = config.model, config.routing
    if config.routed_layers:
        _refuse_what_cannot_be_exported(given)
    routing = routing or RoutingState(config, config.routed_layers, torch.device("cpu"))
    assert routing.layers == config.routed_layers
    return SkipmegaConfig(
        vocab_size=config.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_size,
        hidden_act="silu" if model.activation == "swiglu" else "gelu_pytorch_tanh",
        gated_mlp=model.activation == "swiglu",
        routed_layers=config.routed_layers,
        router=given.router,
        router_thresholds=routing.evaluation_thresholds().tolist(),
        router_bias=given.router_bias or given.router == "fixed_input",
        router_predictor=given.router == "topk" and given.stand_in == "predictor",
        router_input=given.router_input,
        router_temperature=routing.temperature(step),
        router_seed=config.training.seed,
        wrap=given.wrap,
        update_weight=given.weight_of_updates,
        max_position_embeddings=config.data.sequence_length,
        rms_norm_eps=model.norm_epsilon,
        rope_theta=model.rope_theta,
        initializer_range=model.init_std,
        tie_word_embeddings=model.tie_embeddings,
    )


def _refuse_what_cannot_be_exported(routing: RoutingConfig) -> None:
    if routing.eval_capacity_factor is not None:
        raise ConfigError(
            f"routing.eval_capacity_factor={routing.eval_capacity_factor} drops tokens in evaluation, "
            "which the Hugging Face model cannot: set it to null (dropless), for evaluation and export alike"
        )
    if routing.keys_values == "executed":
        raise ConfigError(
            "routing.keys_values=executed makes no keys and values of skipped tokens, and the Hugging Face "
            "model's cache holds those of every token: evaluate the checkpoint natively (tools/evaluate.py), "
            "or train with keys_values=all"
        )


def native_to_hf_names(config: RunConfig) -> dict[str, str]:
    """For every tensor of a run's model, its native name to its name in the Hugging Face model."""
    layer_names = _LAYER_NAMES | (_GATE_NAME if config.model.activation == "swiglu" else {})
    with torch.device("meta"):
        of_router = {f"router.{name}" for name, _ in Router(config.routing, 1).named_parameters()}
    router_names = {native: hf for native, hf in _ROUTER_NAMES.items() if native in of_router}
    names = dict(_MODEL_NAMES)
    for layer in range(config.model.num_layers):
        here = layer_names | (router_names if config.layer_is_routed(layer) else {})
        names |= {f"layers.{layer}.{native}": f"model.layers.{layer}.{hf}" for native, hf in here.items()}
    return names if config.model.tie_embeddings else names | _HEAD_NAME


def to_hf_state(native_state: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Rename a native state dict; tensors are shared, not copied.

    Raises:
        CheckpointError: tensors are missing, unknown, or of a shape that ``config`` does not give.
    """
    return _rename(native_state, native_to_hf_names(config), _shapes(config))


def _shapes(config: RunConfig) -> dict[str, torch.Size]:
    """The shape of every tensor of the Hugging Face model, by its Hugging Face name."""
    hf_config = to_hf_config(config)
    with torch.device("meta"):
        model = SkipmegaForCausalLM(hf_config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _rename(
    state: Mapping[str, Tensor], names: Mapping[str, str], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """``state`` under the new ``names``, after checking it against ``names`` and ``shapes`` (by new name)."""
    missing, unknown = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing or unknown:
        raise CheckpointError(
            f"the checkpoint does not fit the configuration: {len(missing)} tensors are missing "
            f"{missing[:3]}, {len(unknown)} are unknown {unknown[:3]}; use the configuration of the run that "
            "wrote it"
        )
    for name, new_name in names.items():
        if state[name].shape != shapes[new_name]:
            raise CheckpointError(
                f"tensor {name} has shape {tuple(state[name].shape)}, the configuration gives "
                f"{tuple(shapes[new_name])}: use the configuration of the run that wrote the checkpoint"
            )
    return {new_name: state[name] for name, new_name in names.items()}
