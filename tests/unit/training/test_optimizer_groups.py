"""Which parameters an optimizer decays, at which rate, and which optimizer the configuration names."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from skipmega.config import build_config
from skipmega.training.adafactor import ShardedAdafactor
from skipmega.training.engine import TrainingEngine
from skipmega.training.optimizers import build_optimizer

GRID: Any = SimpleNamespace(device=torch.device("cpu"), data=None, tensor=None)


def build(**optimizer: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    stage = nn.ModuleDict(
        {"linear": nn.Linear(3, 2, bias=False), "norm": nn.RMSNorm(3), "head": nn.Linear(2, 3)}
    )
    return stage, build_optimizer(stage, build_config({"optimizer": optimizer}, source="test"), GRID)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_matrices_decay_and_vectors_never(name: str) -> None:
    stage, optimizer = build(name=name, weight_decay=0.3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(p): 0.3 if p.dim() == 2 else 0.0 for p in stage.parameters()}, "each exactly once"


def test_the_settings_arrive() -> None:
    _, adamw = build(learning_rate=0.25, beta1=0.5, beta2=0.75, epsilon=1e-3)
    assert type(adamw) is torch.optim.AdamW
    for group in adamw.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.25, (0.5, 0.75), 1e-3)
    _, adafactor = build(name="adafactor", learning_rate=0.25)
    assert type(adafactor) is ShardedAdafactor
    assert all(group["lr"] == 0.25 for group in adafactor.param_groups)


def routed_stage() -> nn.Module:
    """Two layers as the decoder names them, one with a router of a weight and a bias."""
    layers = {
        "0": nn.ModuleDict({"mlp": nn.Linear(3, 2, bias=False), "norm": nn.RMSNorm(3)}),
        "1": nn.ModuleDict({"mlp": nn.Linear(3, 2, bias=False), "router": nn.Linear(3, 1)}),
    }
    return nn.ModuleDict({"layers": nn.ModuleDict(layers), "final_norm": nn.RMSNorm(3)})


def groups_of(stage: nn.Module, rate: float, name: str) -> dict[str, dict[str, Any]]:
    config = build_config(
        {
            "optimizer": {"name": name, "learning_rate": 0.5, "weight_decay": 0.3},
            "routing": {"router_learning_rate": rate},
        },
        source="test",
    )
    names = {parameter: name for name, parameter in stage.named_parameters()}
    groups = {}
    for group in build_optimizer(stage, config, GRID).param_groups:
        groups[group["name"]] = {**group, "params": {names[parameter] for parameter in group["params"]}}
    return groups


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_routers_have_groups_of_their_own_at_a_rate_of_their_own(name: str) -> None:
    groups = groups_of(routed_stage(), 4.0, name)
    told = {key: (g["params"], g["rate"], g["kind"], g["weight_decay"]) for key, g in groups.items()}
    assert told == {
        "matrices": ({"layers.0.mlp.weight", "layers.1.mlp.weight"}, 1.0, "matrices", 0.3),
        "vectors": ({"layers.0.norm.weight", "final_norm.weight"}, 1.0, "vectors", 0.0),
        "router_matrices": ({"layers.1.router.weight"}, 4.0, "matrices", 0.3),
        "router_vectors": ({"layers.1.router.bias"}, 4.0, "vectors", 0.0),
    }


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_at_the_common_rate_routers_have_no_groups(name: str) -> None:
    """Every stage has the same groups then, whether it has a router or not."""
    groups = groups_of(routed_stage(), 1.0, name)
    assert {key: group["rate"] for key, group in groups.items()} == {"matrices": 1.0, "vectors": 1.0}
    assert "layers.1.router.weight" in groups["matrices"]["params"]
    assert "layers.1.router.bias" in groups["vectors"]["params"]


def test_what_takes_odd_room_comes_last() -> None:
    """Or what ZeRO lays behind it begins where no compiled kernel expects it."""
    stage = nn.ModuleList([nn.Linear(8, 1), nn.RMSNorm(8), nn.Linear(16, 3), nn.Linear(16, 16)])
    config = build_config({"routing": {"router_learning_rate": 1.0}}, source="test")
    sizes = [
        [p.numel() for p in group["params"]] for group in build_optimizer(stage, config, GRID).param_groups
    ]
    assert sizes == [[8, 48, 256], [8, 16, 1, 3]]


def test_the_engine_multiplies_the_scheduled_rate_by_the_group_s() -> None:
    """What TrainingEngine.apply_gradients does before it steps."""
    optimizer = SimpleNamespace(param_groups=[{"rate": 1.0}, {"rate": 4.0}])
    stepped = []
    engine: Any = SimpleNamespace(
        optimizer=optimizer,
        discarded_update=False,
        _deepspeed=SimpleNamespace(
            step=lambda: stepped.append([group["lr"] for group in optimizer.param_groups]),
            get_global_grad_norm=lambda: 2.5,
        ),
        _controllers=[SimpleNamespace(end_step=stepped.append, forget_step=lambda: None)] * 2,
    )
    norm = TrainingEngine.apply_gradients(engine, 7, 0.25)
    assert stepped == [[0.25, 1.0], 7, 7], "the rates before the update, the controllers after it"
    assert float(norm) == 2.5
    engine.discarded_update = True
    TrainingEngine.apply_gradients(engine, 8, 0.25)
    assert stepped[3:] == [[0.25, 1.0]], "an update that was discarded moves no controller"
