"""What a layer sends between tensor-parallel ranks, counted where torch hands it to the process group."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from skipmega.config import build_config
from skipmega.launch.environment import discover_process
from skipmega.models.layer import DecoderLayer, LayerContext
from skipmega.parallel.grid import create_grid, release_grid
from skipmega.parallel.sequence import SequenceShards
from skipmega.routing.router import RouterInputs
from support.worlds import run_world

RANKS, LENGTH, BATCH, HIDDEN, DENSITY = 2, 64, 3, 32, 0.25
UNIT = LENGTH * BATCH * HIDDEN * 4 * (RANKS - 1) // RANKS  # one rank's part of gathering all rows, in bytes
LAYERS = {
    "dense": (None, {}),
    "layer": (DENSITY, {}),
    "mlp": (DENSITY, {"wrap": "mlp"}),
    "attention": (DENSITY, {"wrap": "attention"}),
    "overfull": (DENSITY, {"capacity_factor": 2.0}),
}
# of a unit per direction, with sequence parallelism
EXPECTED = {"dense": 4, "layer": 1 + 3 * DENSITY, "mlp": 2 + 2 * DENSITY, "attention": 3 + DENSITY,
            "overfull": 1 + 3 * 2 * DENSITY}  # fmt: skip


class CountedBytes(TorchDispatchMode):
    """Bytes that this rank sends in ring algorithms, by the kind of number."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = str(function)
        result = function(*arguments, **(keywords or {}))
        if name.startswith("_c10d_functional.") and "wait" not in name:
            turns = {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1, "all_reduce": 2}
            whole = result if "gather" in name else arguments[0]
            kind = "rows" if whole.is_floating_point() else "decisions"
            share = turns[name.split(".")[1]] * (RANKS - 1) / RANKS
            self.sent[kind] += round(whole.numel() * whole.element_size() * share)
        assert not name.startswith("c10d."), "a move that is not counted"
        return result


def count(sequence_parallel: bool) -> dict[str, Any]:
    """For ``run_world``: what each layer sends forward, and backward."""
    parallel = {"tensor_parallel": RANKS, "sequence_parallel": sequence_parallel}
    counted = {}
    for name, (density, routing) in LAYERS.items():
        config = build_config(
            {
                "model": {"num_layers": 3, "hidden_size": HIDDEN, "num_attention_heads": 4},
                "routing": {"router": "gumbel", "group_size": 16, "capacity_factor": 1.0} | routing,
                "parallel": parallel,
                "data": {"sequence_length": LENGTH},
            },
            source="test",
        )
        grid = create_grid(discover_process(), config.parallel)
        shards = SequenceShards.of(grid)
        layer = DecoderLayer(config, density, None, shards)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        rows = len(shards.positions(LENGTH, grid.device))
        noise = torch.randn(rows, BATCH)
        inputs = RouterInputs(torch.tensor(1.0), torch.tensor(1.0), noise)
        hidden = torch.randn(rows, BATCH, HIDDEN, requires_grad=True)
        with CountedBytes() as forward:
            out, _ = layer(hidden, inputs, LayerContext(None, config.routing.capacity_factor))
        with CountedBytes() as backward:
            out.sum().backward()
        release_grid()
        counted[name] = (forward.sent, backward.sent)
    return counted


@pytest.fixture(scope="module")
def with_sequence_parallelism() -> list[Any]:
    return run_world(count, RANKS, True)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_rows_move_packed(name: str, with_sequence_parallelism: list[Any]) -> None:
    """1 + 3P of the four moves of all rows that a dense layer makes, each way."""
    for counted in with_sequence_parallelism:
        forward, backward = counted[name]
        assert forward["rows"] == EXPECTED[name] * UNIT
        assert backward["rows"] == EXPECTED[name] * UNIT
        assert forward["decisions"] == (0 if name == "dense" else LENGTH * BATCH * (RANKS - 1) // RANKS)
        assert backward["decisions"] == 0


def test_all_reduces_of_whole_rows_cost_the_same_together() -> None:
    """Without sequence parallelism: less forward, more backward."""
    for counted in run_world(count, RANKS, False):
        for name, expected in EXPECTED.items():
            forward, backward = counted[name]
            assert forward["rows"] + backward["rows"] == 2 * expected * UNIT, name
            assert not forward["decisions"]
