"""Cutting the layers into stages: the dearest is as cheap as can be."""

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipmega.config import RunConfig, build_config
from skipmega.errors import ConfigError
from skipmega.models.flops import forward_flops_per_token
from skipmega.models.stages import cut_stages, stage_costs


def make_config(layers: int, stages: int, vocabulary: int = 128, **sections: dict[str, Any]) -> RunConfig:
    values: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": layers, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 256,
            "vocab_size": vocabulary,
        },
        "routing": {"router": "always"},
        "parallel": {"pipeline_parallel": stages},
        "data": {"sequence_length": 64},
    }  # fmt: skip
    for section, fields in sections.items():
        values[section] = {**values.get(section, {}), **fields}
    return build_config(values, source="test")


def lengths(config: RunConfig) -> list[int]:
    return [len(layers) for (layers,) in cut_stages(config)]


def test_equal_layers_are_cut_evenly_where_the_head_is_small() -> None:
    assert cut_stages(make_config(12, 3, vocabulary=16)) == [[range(4)], [range(4, 8)], [range(8, 12)]]


def test_a_large_head_takes_layers_from_the_last_stage() -> None:
    assert lengths(make_config(12, 3, vocabulary=2048)) == [5, 5, 2]


def test_skipped_layers_are_cheap() -> None:
    routing = {
        "router": "quantile",
        "density": 0.25,
        "capacity_factor": 1.0,
        "dense_first": 4,
        "dense_last": 0,
    }
    assert lengths(make_config(12, 2, vocabulary=16, routing=routing)) == [3, 9]


@settings(deadline=None, max_examples=40)
@given(
    layers=st.integers(1, 9), stages=st.integers(1, 4), vocabulary=st.sampled_from([16, 1024, 8192]),
    dense=st.integers(0, 3), density=st.sampled_from([0.1, 0.5, 0.9]),
)  # fmt: skip
def test_no_cut_is_cheaper(layers: int, stages: int, vocabulary: int, dense: int, density: float) -> None:
    if stages > layers or dense >= layers:
        return
    routing = {"router": "gumbel", "density": density, "dense_first": dense, "dense_last": 0}
    config = make_config(layers, stages, vocabulary, routing=routing)
    cut = cut_stages(config)
    assert [layer for (chunk,) in cut for layer in chunk] == list(range(layers))
    assert all(chunk for (chunk,) in cut)
    for ends in combinations(range(1, layers), stages - 1):
        each = [end - first for first, end in zip([0, *ends], [*ends, layers], strict=True)]
        other = make_config(layers, stages, vocabulary, routing=routing, parallel={"layers_per_stage": each})
        assert max(stage_costs(config)) <= max(stage_costs(other)) * (1 + 1e-12)


def test_costs_are_those_of_the_whole_model_at_capacity() -> None:
    routing = {"router": "topk", "density": 0.5, "dense_first": 1, "dense_last": 1}
    config = make_config(6, 3, routing=routing)
    assert sum(stage_costs(config)) == pytest.approx(forward_flops_per_token(config, config.densities))


def test_a_given_cut_is_taken() -> None:
    assert lengths(make_config(6, 3, parallel={"layers_per_stage": [1, 4, 1]})) == [1, 4, 1]


def test_chunks_are_dealt_to_the_stages_in_turn() -> None:
    even = make_config(12, 3, vocabulary=16, parallel={"chunks_per_stage": 2})
    assert cut_stages(even) == [
        [range(2), range(6, 8)],
        [range(2, 4), range(8, 10)],
        [range(4, 6), range(10, 12)],
    ]
    given = make_config(6, 2, parallel={"chunks_per_stage": 2, "layers_per_stage": [1, 2, 2, 1]})
    assert cut_stages(given) == [[range(1), range(3, 5)], [range(1, 3), range(5, 6)]]
    assert sum(stage_costs(even)) == pytest.approx(forward_flops_per_token(even, even.densities))


@pytest.mark.parametrize(
    ("layers", "stages", "sections", "parts"),
    [
        (6, 3, {"parallel": {"layers_per_stage": [3, 3]}}, ["layers_per_stage=[3, 3]", "3 numbers", "6"]),
        (6, 2, {"parallel": {"layers_per_stage": [3, 4]}}, ["layers_per_stage=[3, 4]", "add up to 6"]),
        (5, 3, {"parallel": {"chunks_per_stage": 2}}, ["pipeline_parallel x parallel.chunks_per_stage=6"]),
        (2, 3, {}, ["model.num_layers=2", "pipeline_parallel=3", "at most 2"]),
        (
            4, 2,
            {"routing": {"router": "quantile", "router_learning_rate": 2.0, "dense_first": 3, "dense_last":
            0},
             "parallel": {"layers_per_stage": [2, 2]}},
            ["router_learning_rate=2.0", "stage 0 of 2", "set it to 1"],
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused(
    layers: int, stages: int, sections: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        cut_stages(make_config(layers, stages, **sections))
    for part in parts:
        assert part in str(refused.value)
