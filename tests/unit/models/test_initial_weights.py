"""Initial weights are a function of the seed and the parameter's name: the same on every grid."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from skipmega.config import RunConfig, build_config
from skipmega.models.decoder import DecoderStage
from skipmega.parallel.grid import Axis, ParallelGrid
from skipmega.parallel.logical import partition_dim


class Group:
    """As much of a process group as building a stage asks for."""

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def axis(size: int, rank: int) -> Axis:
    return Axis(size=size, rank=rank, group=Group(size, rank))  # type: ignore[arg-type]


def make_config(seed: int = 1, **model: Any) -> RunConfig:
    values = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "ffn_hidden_size": 48,
        "vocab_size": 256,
        "init_std": 0.1,
    } | model
    routing = {"router": "topk", "stand_in": "predictor", "router_bias": True}
    return build_config({"model": values, "routing": routing, "training": {"seed": seed}}, source="test")


def on_stages(config: RunConfig, pipeline: int) -> RunConfig:
    parallel = {"pipeline_parallel": pipeline, "layers_per_stage": [4 // pipeline] * pipeline}
    return build_config(config.model_dump() | {"parallel": parallel}, source="test")


def weights_of(config: RunConfig, grid: ParallelGrid) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in DecoderStage(config, grid).named_parameters()}


def assemble(config: RunConfig, grid: ParallelGrid, tensor: int, pipeline: int) -> dict[str, Tensor]:
    """The whole model from the slices of every rank of a grid; replicas must agree."""
    whole: dict[str, Tensor] = {}
    config = on_stages(config, pipeline)
    for stage in range(pipeline):
        ranks = [
            DecoderStage(config, replace(grid, tensor=axis(tensor, t), pipeline=axis(pipeline, stage)))
            for t in range(tensor)
        ]
        for name, parameter in ranks[0].named_parameters():
            dim = partition_dim(parameter)
            parts = [rank.get_parameter(name).detach() for rank in ranks]
            value = parts[0] if dim is None else torch.cat(parts, dim)
            if dim is None:
                assert all(torch.equal(part, parts[0]) for part in parts), name
            if name in whole:
                assert torch.equal(whole[name], value), f"{name} differs between stages"
            whole[name] = value
    return whole


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 4)])
def test_every_grid_starts_from_the_same_weights(
    grid: ParallelGrid, tensor: int, pipeline: int, tie: bool
) -> None:
    config = make_config(activation="swiglu", tie_embeddings=tie)
    expected = weights_of(config, grid)
    found = assemble(config, grid, tensor, pipeline)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_a_stage_holds_its_share_only(grid: ParallelGrid) -> None:
    config = on_stages(make_config(tie_embeddings=False), 4)
    for stage, ends in enumerate([{"embedding"}, set(), set(), {"final_norm", "head"}]):
        part = DecoderStage(config, replace(grid, tensor=axis(2, 1), pipeline=axis(4, stage)))
        assert {name.split(".")[0] for name, _ in part.named_parameters()} == {"layers"} | ends
        assert list(part.layers) == [str(stage)]
        assert part.get_parameter(f"layers.{stage}.attention.query.weight").shape == (16, 32)
        assert part.get_parameter(f"layers.{stage}.mlp.down.weight").shape == (32, 24)


def test_building_draws_from_no_shared_generator(grid: ParallelGrid) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = weights_of(make_config(), grid)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = weights_of(make_config(), grid)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_norms_are_one_biases_zero_and_matrices_have_their_spread(grid: ParallelGrid) -> None:
    """Writers into the residual stream are scaled by 1/sqrt(2 x 4 layers); bounds of five standard errors."""
    weights = weights_of(make_config(activation="swiglu", tie_embeddings=False), grid)
    for name, weight in weights.items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.full_like(weight, 0 if name.endswith("bias") else 1)), name
            continue
        std = 0.1 / 8**0.5 if name.split(".")[-2] in ("output", "down") else 0.1
        standard_error = 1 / (2 * weight.numel()) ** 0.5
        assert abs(weight.std() / std - 1) < 5 * standard_error, name
        assert abs(weight.mean() / std) < 5 / weight.numel() ** 0.5, name


def test_no_two_matrices_and_no_two_seeds_share_numbers(grid: ParallelGrid) -> None:
    weights, other = weights_of(make_config(seed=1), grid), weights_of(make_config(seed=2), grid)
    first_numbers = [float(w.flatten()[0]) for w in (*weights.values(), *other.values()) if w.dim() == 2]
    assert len(set(first_numbers)) == len(first_numbers)
