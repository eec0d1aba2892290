"""On a GPU too, a step is judged before its update, executed again and is then itself; drift is seen."""

import math
from unittest import mock

import pytest
import torch

from skipmega.config import resolve_grid, resolve_vocabulary
from skipmega.errors import ReplicaDriftError
from skipmega.training.engine import TrainingEngine
from skipmega.training.guard import StepGuard
from skipmega.training.state import hold
from skipmega.training.sums import StepSums
from support.steps import tiny_batches, tiny_config, tiny_grid
from support.worlds import run_world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

STEPS = 3
OVERRIDES = {
    "model": {"hidden_size": 128, "num_attention_heads": 4},
    "routing": {"router": "random", "group_size": 128},
    "data": {"sequence_length": 256},
    "training": {"precision": "bf16", "compile": True, "replica_interval": 1},
}


def guarded(grid, spoiled=None):
    """What each step came to, with a gradient of step ``spoiled`` not finite once; its engine and guard."""
    config = resolve_grid(resolve_vocabulary(tiny_config(OVERRIDES), None), grid.world_size)
    engine, batches, left = TrainingEngine(config, grid), tiny_batches(config, grid), [spoiled]
    guard = StepGuard(config, engine, [], lambda step, phase: None)
    sum_gradients, steps = TrainingEngine._sum_gradients_of_cut_tokens, []

    def spoil(engine):
        if step in left:
            left.remove(step)
            next(engine.stage.parameters()).grad.view(-1)[0] = math.nan
        sum_gradients(engine)

    with mock.patch.object(TrainingEngine, "_sum_gradients_of_cut_tokens", spoil):
        for step in range(STEPS):
            done = guard.step(batches, StepSums.zeros(config, grid), step, 0.01)
            steps.append((done.problem, done.overcome, float(done.sums.loss), float(done.norm)))
    return steps, engine, guard


def guard_steps():
    with tiny_grid({}) as grid:
        plain, engine, _ = guarded(grid)
        engine.close()
        spoiled, engine, guard = guarded(grid, spoiled=1)
        hold(engine, next(engine.stage.parameters())).master.view(torch.int32)[0] ^= 1 << 20
        with pytest.raises(ReplicaDriftError, match=r"ranks differ at step 4: .* on rank 0 \(host"):
            guard.step(tiny_batches(engine.config, grid), StepSums.zeros(engine.config, grid), STEPS, 0.01)
        return plain, spoiled


def test_guarded_steps():
    ((plain, spoiled),) = run_world(guard_steps, 1, limit=280)
    assert [step[:2] for step in plain] == [(None, None)] * STEPS
    assert [step[1] is None for step in spoiled] == [True, False, True]
    assert spoiled[1][1].startswith("the gradients of step 2 are not finite")
    for (*_, loss, norm), (*_, expected_loss, expected_norm) in zip(spoiled, plain, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-3)
        assert norm == pytest.approx(expected_norm, rel=1e-2)
