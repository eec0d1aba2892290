"""Gradients of a bf16 run are summed in fp32, over micro-batches and over data ranks."""

from collections.abc import Iterator
from itertools import repeat

import pytest
import torch
from deepspeed.utils import safe_get_full_grad

from skipmega.config import resolve_grid, resolve_vocabulary
from skipmega.data.order.batches import TokenBatch
from skipmega.launch.environment import discover_process
from skipmega.parallel.grid import create_grid, release_grid
from skipmega.training.sums import StepSums
from support.steps import gather_logical, make_engine, tiny_batches, tiny_config
from support.worlds import run_world

PRECISIONS = ("fp32", "bf16")


def first_step(
    gradient_precision: str, micro_batches: int, same: bool, zero_stage: int = 1, precision: str = "bf16"
):
    """Norm and gradients of a step over ``micro_batches`` per rank, all the ``same`` or each its own."""
    process = discover_process()
    size = 2 * micro_batches * process.world_size
    config = tiny_config(
        {
            "routing": {"router": "always"},
            "model": {"init_std": 0.05},
            "optimizer": {"gradient_clip": 0.0},
            "parallel": {"zero_stage": zero_stage},
            "training": {
                "precision": precision, "gradient_precision": gradient_precision, "micro_batch_size": 2,
                "global_batch_size": size, "eval_sequences": size,
            },
        }
    )  # fmt: skip
    config = resolve_grid(resolve_vocabulary(config, None), process.world_size)
    grid = create_grid(process)
    engine = make_engine(config, grid)
    batches: Iterator[TokenBatch] = tiny_batches(config, grid)
    if same:
        batches = repeat(next(batches))
    engine.accumulate_gradients(batches, 0, StepSums.zeros(config, grid))
    gradients = gather_logical(engine, grid, safe_get_full_grad)
    norm = float(engine.apply_gradients(0, 1e-3))
    release_grid()
    return norm, gradients


def on_one_process():
    return {
        "one": first_step("fp32", 1, same=True),
        **{name: first_step(name, 64, same=True) for name in PRECISIONS},
        "zero2": first_step("fp32", 64, same=True, zero_stage=2),
        "of an fp32 run": first_step("fp32", 64, same=False, precision="fp32"),
        **{f"{name} apart": first_step(name, 64, same=False) for name in PRECISIONS},
        "zero3 one": first_step("fp32", 1, same=True, zero_stage=3),
        "zero3": first_step("fp32", 64, same=True, zero_stage=3),
        "zero3 apart": first_step("fp32", 64, same=False, zero_stage=3),
    }


def on_two_processes():
    results = {name: first_step(name, 32, same=False) for name in PRECISIONS}
    return {**results, "zero3": first_step("fp32", 32, same=False, zero_stage=3)}


@pytest.fixture(scope="module")
def alone():
    (result,) = run_world(on_one_process, 1)
    return result


@pytest.fixture(scope="module")
def of_two():
    return run_world(on_two_processes, 2)


def worst_error(found, expected):
    return max(
        float((found[1][name] - gradient).norm() / gradient.norm()) for name, gradient in expected[1].items()
    )


@pytest.mark.parametrize(("name", "once"), [("fp32", "one"), ("zero2", "one"), ("zero3", "zero3 one")])
def test_sixty_four_times_the_same_is_the_same(name, once, alone):
    assert alone[name][0] == pytest.approx(alone[once][0], rel=1e-5)
    assert worst_error(alone[name], alone[once]) < 1e-5


def test_the_norm_is_that_of_an_fp32_run(alone):
    assert alone["fp32 apart"][0] == pytest.approx(alone["of an fp32 run"][0], rel=1e-3)


def test_in_bf16_much_is_lost(alone):
    """Or the test above would show nothing."""
    assert worst_error(alone["bf16"], alone["one"]) > 1e-3


@pytest.mark.parametrize("name", ["fp32", "zero3"])
def test_nothing_is_rounded_on_the_way_to_the_optimizer(name, alone, of_two):
    for result in of_two:
        assert result[name][0] == pytest.approx(alone[f"{name} apart"][0], rel=1e-5)
        assert worst_error(result[name], alone[f"{name} apart"]) < 1e-5
        assert worst_error(result["bf16"], alone["fp32 apart"]) > 1e-3, "or this would show nothing"
    assert worst_error(alone["fp32 apart"], alone["zero3 apart"]) < 1e-6


def test_widths_of_weights_and_gradients_are_kept_apart(alone):
    assert alone["fp32"][1]["embedding.weight"].dtype == torch.float32
