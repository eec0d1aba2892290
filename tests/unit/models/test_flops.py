"""The accounts of parameters and operations, against a stage that is really built and counted."""

from typing import Any

import pytest

from skipmega.config import RunConfig, build_config
from skipmega.models.decoder import DecoderStage
from skipmega.models.flops import count_parameters, target_shares, training_flops_per_token
from skipmega.parallel.grid import ParallelGrid

LENGTH = 10

SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "gelu": {"model": {}},
    "swiglu-gqa": {"model": {"activation": "swiglu", "num_key_value_heads": 2}},
    "untied-wide-heads": {"model": {"tie_embeddings": False, "head_dim": 10}},
    "dense": {"model": {}, "routing": {"router": "always"}},
    "more-dense-ends": {"model": {}, "routing": {"dense_first": 2, "dense_last": 0}},
    "mlp": {"model": {}, "routing": {"wrap": "mlp", "router": "sigmoid", "router_bias": True}},
    "attention": {"model": {"activation": "swiglu"}, "routing": {"wrap": "attention", "router": "random"}},
    "executed": {"model": {"num_key_value_heads": 2}, "routing": {"keys_values": "executed"}},
    "attention-executed": {"model": {}, "routing": {"wrap": "attention", "keys_values": "executed"}},
    "predictor": {"model": {}, "routing": {"router": "topk", "stand_in": "predictor"}},
    "fixed-input": {"model": {}, "routing": {"router": "fixed_input", "every": 2}},
}
SHARES = {"all": 1.0, "half": 0.5, "mixed": [0.2, 0.8, 0.6], "none": 0.0}


def make_config(name: str) -> RunConfig:
    sections = SHAPES[name]
    model = {
        "num_layers": 4, "hidden_size": 24, "num_attention_heads": 4, "ffn_hidden_size": 40, "vocab_size": 96,
    } | sections["model"]  # fmt: skip
    return build_config(
        {"model": model, "routing": sections.get("routing", {}), "data": {"sequence_length": LENGTH}},
        source="test",
    )


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_model(grid: ParallelGrid, name: str) -> None:
    config = make_config(name)
    assert count_parameters(config) == sum(p.numel() for p in DecoderStage(config, grid).parameters())


def counted_forward(config: RunConfig, stage: DecoderStage, shares: dict[int, float]) -> float:
    """Multiplies and adds of one sequence: each matrix once for each token that meets it, each score and
    each weighted value once for each key a query sees."""
    routing, total = config.routing, 0.0
    for name, parameter in stage.named_parameters():
        kind = name.split(".")[-2]
        if parameter.dim() == 2 and ".router." not in name and kind != "embedding":
            share = shares.get(int(name.split(".")[1]), 1.0) if name.startswith("layers") else 1.0
            if kind in ("up", "gate", "down"):
                met = share if routing.wrap in ("layer", "mlp") else 1.0
            elif kind in ("key", "value"):
                met = share if routing.keys_values == "executed" else 1.0
            else:
                met = share if routing.wrap in ("layer", "attention") else 1.0
            total += 2 * parameter.numel() * LENGTH * met
    if config.model.tie_embeddings:
        total += 2 * stage.embedding.weight.numel() * LENGTH
    width = stage.get_parameter("layers.0.attention.query.weight").shape[0]
    for layer in range(config.model.num_layers):
        share = shares.get(layer, 1.0) if routing.wrap != "mlp" else 1.0
        keys = round(share * LENGTH) if routing.keys_values == "executed" else LENGTH
        pairs = sum(position + 1 for position in range(keys))
        total += pairs * 2 * (2 * width) * (1.0 if routing.keys_values == "executed" else share)
    return total


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("share", SHARES)
def test_operations_are_those_of_the_matrices(grid: ParallelGrid, name: str, share: str) -> None:
    """Of training: backward twice as much as forward."""
    config = make_config(name)
    of_layers = SHARES[share]
    if isinstance(of_layers, float):
        of_layers = [of_layers] * 3
    shares = dict(zip(config.routed_layers, of_layers, strict=False))
    expected = 3 * counted_forward(config, DecoderStage(config, grid), shares) / LENGTH
    assert training_flops_per_token(config, shares) == pytest.approx(expected, rel=1e-12)
    if share == "all":
        assert training_flops_per_token(config) == pytest.approx(expected, rel=1e-12)


def test_a_run_that_meets_its_target_computes_it(grid: ParallelGrid) -> None:
    """Everything, where skipped tokens too are computed."""
    for routing, expected in (
        ({"density": 0.3}, 0.3), ({"router": "never"}, 0.0), ({"router": "highway"}, 1.0),
        ({"gradient": "dense"}, 1.0),
    ):  # fmt: skip
        model = {"num_layers": 4, "vocab_size": 96}
        config = build_config({"model": model, "routing": routing}, source="test")
        assert target_shares(config) == {1: expected, 2: expected}
