"""A step whose gradients were thrown away, by us or by DeepSpeed, and executed again is the step itself."""

import math
from itertools import islice

import pytest
import torch

from skipmega.config import resolve_grid, resolve_vocabulary
from skipmega.training.state import collect_state
from skipmega.training.sums import StepSums, average
from support.parity import names_of, on_each_grid
from support.steps import make_engine, tiny_batches, tiny_config
from support.worlds import run_world

STEPS = 3
OVERRIDES = {
    "fp32": {"routing": {"density_control": "coefficient", "coefficient_rate": 0.5}},
    "bf16": {"training": {"precision": "bf16"}},
    "adafactor": {"optimizer": {"name": "adafactor", "gradient_clip": 0.0}},
}
GRIDS = """
DP2 fp32, DP2 bf16, DP2-Z2 bf16, DP2-Z3 fp32, DP2-Z3 bf16, TP2-SP adafactor, PP2-V2 fp32, CP2 bf16
"""


def train(grid, parallel, variant, twice):
    config = tiny_config({**OVERRIDES[variant], "parallel": parallel})
    size = config.training.model_copy(update={"micro_batch_size": 4 // grid.data.size})
    config = config.model_copy(update={"training": size})
    config = resolve_grid(resolve_vocabulary(config, None), grid.world_size)
    torch.manual_seed(grid.rank)
    engine = make_engine(config, grid)
    batches, seen = tiny_batches(config, grid), []
    for step in range(STEPS):
        kept = list(islice(batches, config.micro_batches))
        if twice:
            engine.accumulate_gradients(iter(kept), step, StepSums.zeros(config, grid))
            if step == 1:  # what DeepSpeed discards
                gradient = next(iter(engine.optimizer.averaged_gradients.values()))[0]
                gradient.view(-1)[0] = math.nan
                engine.apply_gradients(step, 0.01)
                assert engine.discarded_update
            else:
                engine.discard_gradients()
        sums = StepSums.zeros(config, grid)
        engine.accumulate_gradients(iter(kept), step, sums)
        norm = float(engine.apply_gradients(step, 0.01))
        seen.append((average(sums, config, grid).loss, norm))
    state = {key: tensor.local for key, tensor in collect_state(engine).items()}
    engine.close()
    return seen, state


def once_and_twice(grid, parallel, variant):
    return [train(grid, parallel, variant, twice) for twice in (False, True)]


def on_all():
    return on_each_grid(GRIDS, once_and_twice)


@pytest.fixture(scope="module")
def trained():
    return run_world(on_all, 2, limit=240)


@pytest.mark.parametrize("name", names_of(GRIDS))
def test_twice_is_once(name, trained):
    for rank in trained:
        (expected, once), (found, twice) = rank[name]
        assert found == expected
        assert all(torch.equal(twice[key], tensor) for key, tensor in once.items())
