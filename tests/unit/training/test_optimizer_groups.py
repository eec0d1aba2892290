"""Which parameters an optimizer decays, and which optimizer the configuration names."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from skipmega.config import build_config
from skipmega.training.adafactor import ShardedAdafactor
from skipmega.training.optimizers import build_optimizer


def build(**optimizer: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    stage = nn.ModuleDict(
        {"linear": nn.Linear(3, 2, bias=False), "norm": nn.RMSNorm(3), "head": nn.Linear(2, 3)}
    )
    grid = SimpleNamespace(device=torch.device("cpu"), data=None, tensor=None)
    return stage, build_optimizer(stage, build_config({"optimizer": optimizer}, source="test"), grid)  # type: ignore[arg-type]


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
