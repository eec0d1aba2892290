"""The accounts of parameters and operations, against a stage that is really built and counted."""

from typing import Any

import pytest
import torch

from skipmega.config import RunConfig, build_config
from skipmega.models.decoder import DecoderStage
from skipmega.models.flops import count_parameters, training_flops_per_token
from skipmega.parallel.grid import ParallelGrid

LENGTH = 10

SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "gelu": {"model": {}},
    "swiglu-gqa": {"model": {"activation": "swiglu", "num_key_value_heads": 2}},
    "untied-wide-heads": {"model": {"tie_embeddings": False, "head_dim": 10}},
    "dense": {"model": {}, "routing": {"router": "always"}},
    "more-dense-ends": {"model": {}, "routing": {"dense_first": 2, "dense_last": 0}},
}


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


def counted_forward(config: RunConfig, stage: DecoderStage, densities: list[float]) -> float:
    """Multiplies and adds of one sequence over its tokens: each matrix once for each token that meets it,
    each score and each weighted value once for each key a query sees."""
    total = 0.0
    for name, parameter in stage.named_parameters():
        kind = name.split(".")[-2]
        if parameter.dim() == 2 and kind not in ("router", "embedding"):
            layer_share = densities[int(name.split(".")[1])] if name.startswith("layers") else 1.0
            for_all = kind in ("key", "value", "head")
            total += 2 * parameter.numel() * LENGTH * (1.0 if for_all else layer_share)
    if config.model.tie_embeddings:
        total += 2 * stage.embedding.weight.numel() * LENGTH
    width = stage.get_parameter("layers.0.attention.query.weight").shape[0]
    pairs = sum(position + 1 for position in range(LENGTH))
    return total + sum(density * pairs * 2 * (2 * width) for density in densities)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("densities", [None, [1.0, 0.5, 0.25, 1.0], [0.0, 0.0, 0.0, 0.0]])
def test_operations_are_those_of_the_matrices(
    grid: ParallelGrid, name: str, densities: list[float] | None
) -> None:
    """Of training: backward twice as much as forward."""
    config = make_config(name)
    with torch.device("cpu"):
        stage = DecoderStage(config, grid)
    expected = 3 * counted_forward(config, stage, densities or [1.0] * 4) / LENGTH
    assert training_flops_per_token(config, densities) == pytest.approx(expected, rel=1e-12)
