"""Running parts of a layer again in backward: the same decisions and gradients, and less is kept."""

from typing import Any

import pytest
import torch
from torch import Tensor

from skipmega.config import build_config
from skipmega.models.decoder import DecoderStage
from skipmega.models.layer import LayerContext
from skipmega.parallel.grid import ParallelGrid
from skipmega.routing.noise import NoiseKey
from skipmega.routing.state import RoutingState

LENGTH, BATCH = 64, 2
MODEL = {"num_attention_heads": 4, "activation": "swiglu"}
ROUTINGS: dict[str, dict[str, Any]] = {
    "gumbel": {"router": "gumbel"},
    "quantile mlp": {"router": "quantile", "wrap": "mlp"},
    "quantile attention": {"router": "quantile", "wrap": "attention"},
    "mixture of depths": {"router": "topk", "keys_values": "executed"},
    "masked": {"router": "gumbel", "gradient": "dense"},
}


def train_once(
    grid: ParallelGrid, routing: dict[str, Any], recompute: str, compiled: bool = False
) -> tuple[dict[str, Tensor], int]:
    """The output, the decisions and all gradients, and how many bytes were kept for backward."""
    config = build_config(
        {
            "model": {**MODEL, "num_layers": 4, "hidden_size": 32, "vocab_size": 64},
            "routing": routing,
            "training": {"recompute": recompute},
        },
        source="test",
    )
    stage = DecoderStage(config, grid).train()
    if compiled:  # by the parts of a compiler that choose what is kept
        torch._dynamo.reset()
        for layer in stage.layers.values():
            layer.compile(backend="aot_eager_decomp_partition", dynamic=False)
    parameters = {parameter.data_ptr() for parameter in stage.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.randint(0, 64, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    state = RoutingState(config, stage.routed_layers, grid.device)
    inputs = state.for_training(3, NoiseKey(1, torch.arange(BATCH)), torch.arange(LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = stage(tokens, LayerContext(None, 1.25), inputs)
        loss = stage.losses(output.hidden, tokens).mean() + output.densities().sum()
    loss.backward()
    found = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
    executed = {f"executed {layer}": record.executed for layer, record in output.records.items()}
    return {"out": output.hidden.detach(), **executed, **found}, sum(kept.values())


@pytest.mark.parametrize("name", ROUTINGS)
def test_recomputing_changes_nothing_but_what_is_kept(grid: ParallelGrid, name: str) -> None:
    plain, whole = train_once(grid, ROUTINGS[name], "none")
    shares = {}
    for recompute in ("cheap", "attention", "mlp", "full"):
        found, kept = train_once(grid, ROUTINGS[name], recompute)
        shares[recompute] = kept / whole
        assert found.keys() == plain.keys()
        for key, expected in plain.items():
            assert torch.equal(found[key], expected), f"{recompute}: {key}"
    assert shares["full"] < 0.5
    assert max(shares["cheap"], shares["attention"], shares["mlp"]) < 0.9


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", ["gumbel", "quantile mlp"])
def test_compiled_layers_make_the_same_gradients_of_what_is_made_anew(grid: ParallelGrid, name: str) -> None:
    plain, whole = train_once(grid, ROUTINGS[name], "none", compiled=True)
    found, kept = train_once(grid, ROUTINGS[name], "cheap", compiled=True)
    for key, expected in plain.items():
        assert torch.equal(found[key], expected), key
    assert kept < 0.85 * whole
