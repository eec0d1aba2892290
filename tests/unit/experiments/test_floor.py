"""The least time of a step: operations against the account of FLOPs, bytes against a count by hand."""

from typing import Any

import pytest

from skipmega.config import RunConfig, build_config
from skipmega.experiments.floor import (
    ELEMENT,
    H100,
    Device,
    Operation,
    floor,
    kept_bytes,
    layer_bound,
    layer_operations,
    memory_bound,
    operation_table,
    step_bound,
    step_operations,
    tables,
    tile_waste,
)
from skipmega.models.flops import count_parameters, layer_flops, training_flops_per_token

LENGTH, SEQUENCES = 32, 2
TOKENS = LENGTH * SEQUENCES


def make_config(**model: Any) -> RunConfig:
    shape = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 4, "ffn_hidden_size": 40,
             "vocab_size": 96, **model}  # fmt: skip
    return build_config({"model": shape, "data": {"sequence_length": LENGTH}}, source="test")


SHAPES = {
    "gelu": make_config(),
    "swiglu-gqa": make_config(activation="swiglu", num_key_value_heads=2),
    "wide-heads": make_config(head_dim=10),
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("density", [None, 1.0, 0.5, 0.125])
def test_operations_are_those_of_the_account(config: RunConfig, density: float | None) -> None:
    """Which counts attention's backward as twice its forward; 2.5 times run."""
    operations = layer_operations(config, density, SEQUENCES)
    attention = next(o.flops for o in operations if o.name == "attention")
    counted = 3 * TOKENS * layer_flops(config, density or 1.0)
    assert sum(o.flops for o in operations) == pytest.approx(counted + attention / 2)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_step_adds_head_loss_and_update(config: RunConfig) -> None:
    operations = step_operations(config, [None] * 4, SEQUENCES)
    attention = 4 * next(o.flops for o in operations if o.name == "attention")
    counted = TOKENS * training_flops_per_token(config)
    assert sum(o.flops for o in operations) == pytest.approx(counted + attention / 2)
    weights = count_parameters(config)
    (update,) = [o.bytes for o in operations if o.name == "update"]
    assert update == 38 * weights / config.micro_batches


def test_traffic_by_hand() -> None:
    """GELU, no grouped heads: 64 tokens of 24, 16 of them packed, inner width 40."""
    traffic = {o.name: o.bytes / ELEMENT for o in layer_operations(SHAPES["gelu"], 0.25, SEQUENCES)}
    full, packed, inner = 64 * 24, 16 * 24, 16 * 40
    assert traffic["first norm"] == full + full
    assert traffic["gather"] == packed + packed
    assert traffic["activation"] == inner + inner
    assert traffic["activation, backward"] == 2 * inner + 2 * inner  # gradient, input; two results
    assert traffic["combine"] == 2 * packed + 2 * full
    assert traffic["mlp up"] == packed + 24 * 40 + inner
    assert traffic["mlp up, weight's"] == packed + 24 * 40 + inner
    assert traffic["attention"] == 2 * packed + 2 * full


def test_dense_layers_gather_and_combine_nothing() -> None:
    dense, packed = ({o.name for o in layer_operations(SHAPES["gelu"], p, 1)} for p in (None, 1.0))
    assert {name for name in packed - dense if "gather" in name or "combine" in name} == packed - dense
    assert dense - packed == {"residual"}


@pytest.mark.parametrize(
    ("rows", "columns", "waste"),
    [
        (128 * 132, 256, 1.0),
        (128 * 133, 256, 1.1 * 3 * 132 / 266),  # a tile more than processors: three waves of smaller ones
        (64, 256, 1.1 * 132),  # two processors, each with half a tile
    ],
)
def test_tiles_that_do_not_fill_the_processors(rows: int, columns: int, waste: float) -> None:
    assert tile_waste(rows, columns, 132) == pytest.approx(waste)


def test_an_operation_takes_the_longer_of_arithmetic_and_traffic() -> None:
    device = Device("toy", matrix_flops=100.0, attention_flops=10.0, bandwidth=50.0, processors=1)
    assert Operation("a", "matrix", 200.0, 50.0).seconds(device) == 2.0
    assert Operation("a", "attention", 200.0, 50.0).seconds(device) == 20.0
    assert Operation("a", "traffic", 0.0, 50.0).seconds(device) == 1.0
    both = floor([Operation("a", "matrix", 200.0, 50.0), Operation("b", "traffic", 0.0, 50.0)], device)
    assert (both.matrix, both.attention, both.traffic, both.total) == (2.0, 0.0, 1.0, 3.0)


def test_bounds_are_those_of_what_does_not_shrink() -> None:
    """Only arithmetic: all of it shrinks as its FLOPs do. Only traffic: norms of all tokens stay."""
    config = SHAPES["swiglu-gqa"]
    arithmetic = Device("arithmetic", 1.0, 2.5 * 3 / 7.5, 1e30, 1)
    for bound in (layer_bound, step_bound):
        reached = bound(config, 0.25, SEQUENCES, arithmetic, False)
        assert reached == pytest.approx(1.0, abs=0.01)
        assert bound(config, 0.25, SEQUENCES, H100, True) < 0.9


def test_memory_by_hand() -> None:
    """GELU, no grouped heads: 64 tokens of 24, 16 of them packed, inner width 40 before and after."""
    config = SHAPES["gelu"]
    assert kept_bytes(config, None, SEQUENCES, False) == 2 * 64 * (2 * 24 + 2 * 24 + 2 * 24 + 2 * 24 + 80)
    assert kept_bytes(config, 0.25, SEQUENCES, False) == 2 * (64 * 4 * 24 + 16 * (4 * 24 + 80))
    assert kept_bytes(config, 0.25, SEQUENCES, True) == 2 * (64 * 3 * 24 + 16 * (3 * 24 + 80))
    ratio = (64 * 3 * 24 + 16 * (3 * 24 + 80)) / (64 * (8 * 24 + 80))
    flops = layer_flops(config, 1.0) / layer_flops(config, 0.25)
    assert memory_bound(config, 0.25, True) == pytest.approx(ratio * flops)


def test_tables_show_every_density() -> None:
    shown = tables(SHAPES["gelu"], H100)
    assert [line.split(" | ")[1] for line in shown.splitlines() if line.startswith("| GQA")] == [
        "dense", "0.5", "0.25", "0.125",
    ]  # fmt: skip
    rows = operation_table(SHAPES["gelu"], H100).splitlines()
    assert len(rows) == 2 + 13
    combined = next(row for row in rows if row.startswith("| combine"))
    assert combined.split(" | ")[1] == ""  # not in a dense layer
