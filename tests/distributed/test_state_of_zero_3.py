"""The state of a run whose parameters are cut over data ranks is taken and put back whole."""

from itertools import islice

import pytest
import torch

from skipmega.config import resolve_grid, resolve_vocabulary
from skipmega.launch.environment import discover_process
from skipmega.parallel.grid import create_grid, release_grid
from skipmega.training.optimizers import updates_done
from skipmega.training.state import collect_state, restore_state
from skipmega.training.sums import StepSums, average
from support.steps import GLOBAL_BATCH, make_engine, tiny_batches, tiny_config
from support.worlds import run_world

HALF, STEPS = 2, 4
MOVES = [(3, 3), (1, 3), (3, 1)]


def make(zero_stage, precision):
    """A fresh engine; its biases, one number each, cannot be cut evenly."""
    process = discover_process()
    config = tiny_config(
        {
            "routing": {"router": "sigmoid", "router_bias": True},
            "parallel": {"zero_stage": zero_stage},
            "training": {"precision": precision, "micro_batch_size": 2, "eval_sequences": 4},
        }
    )
    config = resolve_grid(resolve_vocabulary(config, None), process.world_size)
    grid = create_grid(process)
    return make_engine(config, grid), grid


def train(engine, grid, first, last):
    """Losses and norms, and a held-out loss after the first step: evaluation in between changes nothing."""
    seen = []
    batches = tiny_batches(engine.config, grid, first_sample=first * GLOBAL_BATCH)
    for step in range(first, last):
        sums = StepSums.zeros(engine.config, grid)
        norm = engine.train_step(batches, step, 0.01, sums)
        seen.append((average(sums, engine.config, grid).loss, float(norm)))
        if step == first:
            held_out = list(islice(tiny_batches(engine.config, grid, first_sample=1000), 1))
            seen.append((engine.evaluate(iter(held_out), 1, step).loss, 0.0))
    return seen


def move(precision, before, after):
    """Train to the half on one stage of ZeRO, go on in another engine on another; and never stopped."""
    engine, grid = make(before, precision)
    train(engine, grid, 0, HALF)
    half, updates = collect_state(engine), updates_done(engine.optimizer)
    expected = train(engine, grid, HALF, STEPS)
    whole = collect_state(engine)
    release_grid()

    engine, grid = make(after, precision)
    train(engine, grid, 0, 1)  # to be forgotten
    restore_state(engine, updates, half)
    restored = collect_state(engine)
    assert {name: tensor.dim for name, tensor in restored.items()} == {n: t.dim for n, t in half.items()}
    found = train(engine, grid, HALF, STEPS)
    final = collect_state(engine)
    release_grid()
    return {
        "half": half, "restored": restored, "expected": expected, "found": found,
        "whole": whole, "final": final,
    }  # fmt: skip


def all_moves():
    return {
        (precision, *stages): move(precision, *stages) for precision in ("fp32", "bf16") for stages in MOVES
    }


@pytest.fixture(scope="module")
def moves():
    return run_world(all_moves, 2)


def tensors(state):
    return {name: tensor.local for name, tensor in state.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("before", "after"), MOVES)
def test_what_is_put_back_is_what_was_taken(precision, before, after, moves):
    for rank in moves:
        result = rank[precision, before, after]
        taken, restored = tensors(result["half"]), tensors(result["restored"])
        assert taken["weights/layers.1.router.bias"].shape == (1,), "uneven"
        assert taken.keys() == restored.keys()
        for name, tensor in taken.items():
            assert torch.equal(restored[name], tensor), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_going_on_is_the_same_to_the_last_bit(precision, moves):
    for rank in moves:
        result = rank[precision, 3, 3]
        assert result["found"] == result["expected"]
        final = tensors(result["final"])
        for name, tensor in tensors(result["whole"]).items():
            assert torch.equal(final[name], tensor), name


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_going_on_with_another_stage_is_the_same_training(before, after, moves):
    """In bf16 the gradients of ZeRO 1 are rounded, so that only the first step is that of ZeRO 3."""
    for rank in moves:
        for precision, steps, tolerance in (("fp32", STEPS, 1e-5), ("bf16", 1, 1e-4)):
            result = rank[precision, before, after]
            found, expected = result["found"][:steps], result["expected"][:steps]
            assert found[0][0] == pytest.approx(expected[0][0], rel=1e-6), "before any update"
            for pair in zip(found, expected, strict=True):
                assert pair[0] == pytest.approx(pair[1], rel=tolerance)
