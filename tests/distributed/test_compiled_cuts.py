"""A layer whose tokens and matrices are cut is traced as one program, collectives included.

By torch's tracer and autograd alone, without generating code: tests/gpu/test_two_gpus.py runs what is
generated.
"""

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

from skipmega.launch.environment import discover_process
from skipmega.models.layer import DecoderLayer, LayerContext
from skipmega.parallel.grid import create_grid, release_grid
from skipmega.parallel.sequence import SequenceShards
from skipmega.routing.router import RouterInputs
from support.parity import parallel_of
from support.steps import LENGTH, tiny_config
from support.worlds import run_world

BATCH = 2
ROUTINGS = {
    "gumbel": {},
    "quantile": {"router": "quantile"},
    "bias": {"router": "sigmoid", "density_control": "bias"},
}
CUTS = ("TP2", "TP2-SP", "CP2")


def gradients(layer: Any, hidden: Tensor, inputs: RouterInputs, context: LayerContext) -> list[Tensor | None]:
    out, record = layer(hidden, inputs, context)
    loss = out.square().sum() + record.chosen.mean()
    return list(torch.autograd.grad(loss, [hidden, *layer.parameters()], allow_unused=True))


def trace(cut: str, routing: dict[str, Any]) -> tuple[dict[str, int], int, float]:
    """Breaks of the graph, number of graphs, and how far gradients are off."""
    config = tiny_config({"parallel": parallel_of(cut), "routing": routing})
    grid = create_grid(discover_process(), config.parallel)
    shards = SequenceShards.of(grid)
    torch.manual_seed(0)
    layer = DecoderLayer(config, 0.5, None, shards)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    rows = len(shards.positions(LENGTH, grid.device))
    hidden = torch.randn(rows, BATCH, config.model.hidden_size, requires_grad=True)
    inputs = RouterInputs(torch.tensor(0.0), torch.tensor(1.0), torch.randn(rows, BATCH))
    context = LayerContext(
        None, 1.1,
        rotary=layer.attention.rotary_table(LENGTH, grid.device),
        positions=shards.context_positions(LENGTH, grid.device).unsqueeze(1),
    )  # fmt: skip
    expected = gradients(layer, hidden, inputs, context)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = gradients(torch.compile(layer, backend="aot_eager", dynamic=False), hidden, inputs, context)
    counters = torch._dynamo.utils.counters
    release_grid()
    off = max(
        float((mine - theirs).abs().max())
        for mine, theirs in zip(found, expected, strict=True)
        if mine is not None and theirs is not None
    )
    return dict(counters["graph_break"]), counters["stats"]["unique_graphs"], off


def trace_all() -> dict[tuple[str, str], Any]:
    return {(cut, name): trace(cut, routing) for cut in CUTS for name, routing in ROUTINGS.items()}


@pytest.fixture(scope="module")
def traced() -> list[Any]:
    return run_world(trace_all, 2)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("cut", CUTS)
def test_a_layer_is_one_program_with_the_same_gradients(cut: str, routing: str, traced: list[Any]) -> None:
    for results in traced:
        breaks, graphs, off = results[cut, routing]
        assert not breaks
        assert graphs == 1
        assert off < 1e-5
