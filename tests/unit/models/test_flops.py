"""The accounts of parameters and operations, against a stage that is really built and counted."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from skipmega.config import RunConfig, build_config
from skipmega.errors import ConfigError
from skipmega.models.decoder import DecoderStage
from skipmega.models.flops import (
    active_parameters,
    count_parameters,
    density_for_flops,
    embedding_parameters,
    forward_flops_per_token,
    layer_parameters,
    target_shares,
    training_flops_per_token,
)
from skipmega.models.layer import LayerContext
from skipmega.parallel.grid import ParallelGrid
from skipmega.routing.noise import NoiseKey
from skipmega.routing.state import RoutingState

LENGTH, BATCH, HIDDEN, LAYERS = 12, 2, 24, 4

SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "gelu": {"model": {}},
    "swiglu-gqa": {"model": {"activation": "swiglu", "num_key_value_heads": 2}},
    "untied-wide-heads": {"model": {"tie_embeddings": False, "head_dim": 10}},
    "dense": {"routing": {"router": "always"}},
    "more-dense-ends": {"routing": {"dense_first": 2, "dense_last": 0}},
    "mlp": {"routing": {"wrap": "mlp"}},
    "attention": {"routing": {"wrap": "attention"}},
    "executed-keys": {"routing": {"router": "topk", "keys_values": "executed"}},
    "executed-keys-of-attention": {
        "model": {"num_key_value_heads": 1},
        "routing": {"router": "topk", "wrap": "attention", "keys_values": "executed"},
    },
    "mixture-of-depths": {
        "routing": {
            "router": "topk", "keys_values": "executed", "dense_first": 0, "dense_last": 0, "every": 2,
            "stand_in": "predictor",
        }
    },
    "highway": {"routing": {"router": "highway"}},
    "fixed-input": {"routing": {"router": "fixed_input"}},
    "bias": {"routing": {"router_bias": True}},
}  # fmt: skip


def make_config(name: str, density: Any = 0.5, **model: Any) -> RunConfig:
    sections = SHAPES[name]
    return build_config(
        {
            "model": {
                "num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": 4, "ffn_hidden_size": 40,
                "vocab_size": 96, **sections.get("model", {}), **model,
            },
            "routing": {
                "router": "gumbel", "density": density, "capacity_factor": None,
                **sections.get("routing", {}),
            },
            "data": {"sequence_length": LENGTH},
        },
        source="test",
    )  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_model(grid: ParallelGrid, name: str) -> None:
    config = make_config(name)
    stage = DecoderStage(config, grid)
    sizes = {key: parameter.numel() for key, parameter in stage.named_parameters()}
    assert count_parameters(config) == sum(sizes.values())
    tables = sum(size for key, size in sizes.items() if key.startswith(("embedding.", "head.")))
    assert embedding_parameters(config) == tables
    for layer in range(LAYERS):
        own = sum(size for key, size in sizes.items() if key.startswith(f"layers.{layer}."))
        assert layer_parameters(config, layer) == own


def token_by_token(config: RunConfig, executed: dict[int, set[int]], stage: DecoderStage) -> tuple[int, int]:
    """Operations of a sequence in matrices, and in attention's scores and weighted values.

    Each matrix once for each token that meets it, two products of a head's channels for each key that a
    query sees. ``executed``: positions by routed layer; of all other layers, all.
    """
    everybody = set(range(LENGTH))
    weights = {name: p.numel() for name, p in stage.named_parameters() if p.dim() == 2}
    matrices = 2 * LENGTH * weights["embedding.weight" if config.model.tie_embeddings else "head.weight"]
    attention = 0
    for layer in range(config.model.num_layers):
        chosen = executed.get(layer, everybody)
        wraps_attention = config.routing.wrap in ("layer", "attention")
        askers = chosen if wraps_attention else everybody
        walkers = chosen if config.routing.wrap in ("layer", "mlp") else everybody
        keys = askers if config.routing.keys_values == "executed" else everybody
        for part, tokens in (
            ("attention.query", askers), ("attention.output", askers), ("attention.key", keys),
            ("attention.value", keys), ("mlp.up", walkers), ("mlp.down", walkers), ("mlp.gate", walkers),
        ):  # fmt: skip
            matrices += 2 * weights.get(f"layers.{layer}.{part}.weight", 0) * len(tokens)
        channels = weights[f"layers.{layer}.attention.query.weight"] // HIDDEN
        attention += sum(2 * 2 * channels for asker in askers for key in keys if key <= asker)
    return matrices, attention


NOBODY: set[int] = set()
AROUND_THE_MIDDLE = {0, 2, 5, 6, 9, 11}  # whose mean position is a sequence's


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("positions", [set(range(LENGTH)), AROUND_THE_MIDDLE, {5, 6}, NOBODY], ids=len)
def test_operations_are_those_of_each_token(grid: ParallelGrid, name: str, positions: set[int]) -> None:
    config = make_config(name)
    layers = config.routed_layers[:2]  # a third one, if there is, is left dense
    counted = sum(token_by_token(config, dict.fromkeys(layers, positions), DecoderStage(config, grid)))
    shares = dict.fromkeys(layers, len(positions) / LENGTH)
    assert forward_flops_per_token(config, shares) == pytest.approx(counted / LENGTH, rel=1e-12)
    assert training_flops_per_token(config, shares) == pytest.approx(3 * counted / LENGTH, rel=1e-12)


def test_without_shares_operations_are_those_of_a_dense_model() -> None:
    for name in ("gelu", "mlp", "mixture-of-depths"):
        config = make_config(name)
        assert training_flops_per_token(config) == 3 * forward_flops_per_token(make_config("dense"), {})
        assert training_flops_per_token(config) == 3 * forward_flops_per_token(config, {1: 1.0})


@pytest.mark.parametrize("name", sorted({*SHAPES} - {"fixed-input", "bias", "gelu", "swiglu-gqa"}))
def test_matrices_of_the_account_are_those_that_the_model_multiplies(grid: ParallelGrid, name: str) -> None:
    """Counted by torch in a forward pass of the stage; top-k executes the density to the token."""
    config = make_config(name)
    if config.routing.router == "gumbel":
        config = build_config(
            {**config.model_dump(), "routing": {**config.routing.model_dump(), "router": "topk"}}, source="t"
        )
    stage = DecoderStage(config, grid).train()
    inputs = RoutingState(config, stage.routed_layers, grid.device).for_training(
        0, NoiseKey(1, torch.arange(BATCH)), torch.arange(LENGTH)
    )
    of_vectors = {torch.ops.aten.mv: lambda matrix, vector, out_shape: 2 * matrix.numel()}
    counter = FlopCounterMode(display=False, custom_mapping=of_vectors)
    with counter:
        output = stage(torch.randint(0, 96, (BATCH, LENGTH)), LayerContext(None, None), inputs)
        stage.logits(output.hidden)
    by_operation = {str(key): value for key, value in counter.get_flop_counts()["Global"].items()}
    multiplied = sum(by_operation.get(operation, 0) for operation in ("aten.mm", "aten.addmm", "aten.mv"))
    routers = sum(
        2 * parameter.numel() * LENGTH * BATCH
        for key, parameter in stage.named_parameters()
        if ".router." in key and parameter.dim() == 2
    )
    shares = target_shares(config)
    counted = forward_flops_per_token(config, shares) * LENGTH * BATCH
    channels = config.model.num_attention_heads * config.model.head_size
    for layer in range(LAYERS):
        share = shares.get(layer, 1.0)
        asking = 1.0 if config.routing.wrap == "mlp" else share
        keys = share * LENGTH if config.routing.keys_values == "executed" else LENGTH
        counted -= asking * LENGTH * BATCH * 4 * channels * (keys + 1) / 2
    assert multiplied - routers == pytest.approx(counted, rel=1e-12)


def test_what_is_computed_at_the_target_is_the_density_or_everything() -> None:
    ramp = {"first": 0.25, "last": 0.75}
    assert target_shares(make_config("gelu", ramp)) == {1: 0.25, 2: 0.75}
    assert target_shares(make_config("highway", ramp)) == {1: 1.0, 2: 1.0}
    assert target_shares(make_config("dense")) == {}
    everything = {**SHAPES["gelu"], "routing": {"gradient": "dense", "density": 0.25}}
    assert target_shares(build_config(everything, source="test")) == dict.fromkeys(range(1, 11), 1.0)


def test_active_parameters_are_those_a_token_meets() -> None:
    """Counted by hand: hidden 24, 4 heads of 6, an inner width of 40."""
    keys_values, queries, mlp = 2 * 24 * 24, 2 * 24 * 24, 2 * 24 * 40
    shares = {1: 0.25, 2: 0.5}
    for name, idle in {
        "gelu": (0.75 + 0.5) * (queries + mlp),
        "mlp": (0.75 + 0.5) * mlp,
        "attention": (0.75 + 0.5) * queries,
        "executed-keys": (0.75 + 0.5) * (keys_values + queries + mlp),
        "dense": 0,
    }.items():
        config = make_config(name)
        told = {} if name == "dense" else shares
        assert active_parameters(config, told) == count_parameters(config) - idle


@pytest.mark.parametrize(
    "name", ["gelu", "swiglu-gqa", "mlp", "attention", "executed-keys", "mixture-of-depths"]
)
@pytest.mark.parametrize("density", [1.0, 0.7, 0.01])
def test_the_density_for_operations_gives_them(name: str, density: float) -> None:
    config = make_config(name, density)
    wanted = forward_flops_per_token(config, target_shares(config))
    other = make_config(name, 0.5)
    found = density_for_flops(other, wanted)
    assert found == pytest.approx(density, rel=1e-9)
    solved = make_config(name, found)
    assert forward_flops_per_token(solved, target_shares(solved)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("factor", [0.999, 1.001])
def test_operations_that_no_density_gives_are_refused(factor: float) -> None:
    config = make_config("gelu")
    everybody, nobody = (
        forward_flops_per_token(config, dict.fromkeys(config.routed_layers, share)) for share in (1.0, 0.0)
    )
    wanted = everybody * factor if factor > 1 else nobody * factor
    with pytest.raises(
        ConfigError, match=r"no routing\.density gives .* forward operations per token"
    ) as told:
        density_for_flops(config, wanted)
    for part in ("model.num_layers=4", "2 of them routed", f"{nobody:.6g}", f"{everybody:.6g}"):
        assert part in str(told.value)
    with pytest.raises(ConfigError, match="density 0, not included"):
        density_for_flops(config, nobody)


@pytest.mark.parametrize("routing", [{"router": "always"}, {"router": "never"}, {"router": "highway"},
                                     {"gradient": "dense"}])  # fmt: skip
def test_where_the_density_changes_nothing_none_is_found(routing: dict[str, str]) -> None:
    config = build_config({"model": {"vocab_size": 96}, "routing": routing}, source="test")
    with pytest.raises(ConfigError, match=r"same operations at any routing\.density: choose a router"):
        density_for_flops(config, 1e6)
