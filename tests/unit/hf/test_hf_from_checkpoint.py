"""From a checkpoint to an export: its thresholds, and the dial that moves them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_reference import make_config, random_state

from skipmega.checkpoint.store import Checkpoint, CheckpointStore
from skipmega.errors import CheckpointError, ConfigError
from skipmega.hf import load_export
from skipmega.hf.from_checkpoint import export_checkpoint
from skipmega.parallel.grid import ParallelGrid, end_communication
from skipmega.parallel.logical import LogicalTensor
from skipmega.routing.state import LEVELS, RoutingState

Save = Callable[..., Checkpoint]
FIRST = [0.5, -0.25, 0.125]  # thresholds of the three routed layers


@pytest.fixture
def save(grid: ParallelGrid, tmp_path: Path) -> Save:
    """Writes a checkpoint of step 7 with a routing section; layer i has scores from -i-1 to i+1."""

    def write(routing: dict[str, Any], forget: str = "nothing") -> Checkpoint:
        config = make_config(routing)
        state = RoutingState(config, config.routed_layers, torch.device("cpu"))
        for i in range(len(state.layers)):
            state.threshold[i] = FIRST[i]
            state.margins[i] = torch.linspace(-i - 1, i + 1, LEVELS) - FIRST[i]
        tensors = {f"weights/{name}": LogicalTensor(t, None) for name, t in random_state(config).items()}
        tensors |= {f"routing/{name}": LogicalTensor(t, None) for name, t in state.tensors().items()}
        kept = {name: t for name, t in tensors.items() if forget not in name}
        path = CheckpointStore(tmp_path / "run", keep=0).save(grid, config, {"step": 7}, kept)
        end_communication()
        return Checkpoint.open(path)

    return write


@pytest.mark.parametrize(
    ("routing", "eval_density", "thresholds"),
    [
        ({}, None, FIRST),
        ({}, 0.25, [0.5, 1.0, 1.5]),
        ({"eval_density": 0.25}, None, [0.5, 1.0, 1.5]),
        ({"eval_density": 0.25}, 0.75, [-0.5, -1.0, -1.5]),
        ({"router": "quantile", "density": 0.25}, None, [0.5, 1.0, 1.5]),
        ({"router": "random"}, 1.0, [-torch.inf] * 3),
    ],
    ids=["trained", "asked", "configured", "asked otherwise", "quantile", "everybody"],
)
def test_thresholds_are_those_of_evaluation(
    save: Save, tmp_path: Path, routing: dict[str, Any], eval_density: float | None, thresholds: list[float]
) -> None:
    """The export is also compared with the native model, at the same density."""
    checkpoint = save(routing)
    difference = export_checkpoint(checkpoint, tmp_path / "export", "fp32", 1e-4, eval_density)
    assert difference is not None
    assert difference < 1e-4
    assert load_export(tmp_path / "export").config.router_thresholds == pytest.approx(thresholds)


def test_bf16_weights_leave_thresholds_exact(save: Save, tmp_path: Path) -> None:
    checkpoint = save({"router": "quantile", "density": 0.3})
    assert export_checkpoint(checkpoint, tmp_path / "export", "bf16", 1e-4) is None
    model = load_export(tmp_path / "export")
    state = RoutingState(checkpoint.config, [1, 2, 3], torch.device("cpu"))
    state.load(checkpoint.read_routing())
    assert model.config.router_thresholds == state.evaluation_thresholds().tolist()
    assert model.model.layers[1].router.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("routing", "eval_density", "message"),
    [
        ({}, 1.5, r"routing.eval_density: 1.5 is no density: give a share greater than 0 and less than"),
        ({}, 0.0, r"routing.eval_density: 0.0 is no density"),
        ({"router": "always"}, 0.5, "eval_density has no meaning for router=always: leave it out"),
        ({"router": "highway"}, 0.5, "eval_density has no meaning for router=highway: leave it out"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    save: Save, tmp_path: Path, routing: dict[str, Any], eval_density: float | None, message: str
) -> None:
    checkpoint = save(routing)
    with pytest.raises(ConfigError, match=message):
        export_checkpoint(checkpoint, tmp_path / "export", "fp32", 1e-4, eval_density)
    assert not (tmp_path / "export").exists()


def test_a_checkpoint_without_thresholds_is_refused(save: Save, tmp_path: Path) -> None:
    checkpoint = save({}, forget="layers.2.threshold")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .* \['layers.2.threshold'\]"):
        export_checkpoint(checkpoint, tmp_path / "export", "fp32", 1e-4)
    assert not (tmp_path / "export").exists()
