"""The spine: the same model, data and seed give the same result on every grid."""

import pytest
import torch

from support.steps import plain_step, train_tiny
from support.worlds import run_world

STEPS = 3
UNTIED_SWIGLU = {
    "model": {"tie_embeddings": False, "activation": "swiglu"},
    "routing": {"capacity_factor": None},
}
ADAFACTOR = {"optimizer": {"name": "adafactor", "gradient_clip": 0.0}}
ZERO2 = {"parallel": {"zero_stage": 2}}
VARIANTS = {"adamw": None, "untied-swiglu-dropless": UNTIED_SWIGLU, "adafactor": ADAFACTOR}
# name: (tensor, pipeline, variant); what is left of the world is data parallel
GRIDS_OF_2 = {
    "TP2": (2, 1, "adamw"),
    "PP2": (1, 2, "adamw"),
    "DP2": (1, 1, "adamw"),
    "DP2-zero2": (1, 1, "zero2"),
    "TP2-untied": (2, 1, "untied-swiglu-dropless"),
    "PP2-untied": (1, 2, "untied-swiglu-dropless"),
    "DP2-untied": (1, 1, "untied-swiglu-dropless"),
    "TP2-adafactor": (2, 1, "adafactor"),
    "DP2-adafactor": (1, 1, "adafactor"),
}
GRIDS_OF_4 = {
    "TP2-PP2": (2, 2, "adamw"),
    "TP2-DP2": (2, 1, "adamw"),
    "PP2-DP2": (1, 2, "adamw"),
    "PP4": (1, 4, "adamw"),
    "DP4": (1, 1, "adamw"),
    "PP2-DP2-zero2": (1, 2, "zero2"),
    "TP2-PP2-untied": (2, 2, "untied-swiglu-dropless"),
    "TP2-DP2-adafactor": (2, 1, "adafactor"),
}


def overrides_of(variant):
    return ZERO2 if variant == "zero2" else VARIANTS[variant]


def train_all(grids):
    return {
        name: train_tiny(tensor, pipeline, STEPS, overrides_of(variant))
        for name, (tensor, pipeline, variant) in grids.items()
    }


def train_and_write_down():
    trained = train_all({name: (1, 1, name) for name in VARIANTS})
    return trained, {name: plain_step(overrides) for name, overrides in VARIANTS.items()}


@pytest.fixture(scope="module")
def one_process():
    ((results, plain),) = run_world(train_and_write_down, 1)
    return {**results, "zero2": results["adamw"], "plain": plain}


@pytest.fixture(scope="module")
def two_processes():
    return run_world(train_all, 2, GRIDS_OF_2)


@pytest.fixture(scope="module")
def four_processes():
    return run_world(train_all, 4, GRIDS_OF_4, limit=240)


def check_equal(found, expected):
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["executed"], expected["executed"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found["held_out"].loss, expected["held_out"].loss, rtol=1e-5, atol=0)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        error = (found["gradients"][name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, f"gradient of {name} is off by {error:.1e}"
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(
            found["weights"][name], weight, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", GRIDS_OF_2)
def test_two_processes_equal_one(name, one_process, two_processes):
    for rank_results in two_processes:
        check_equal(rank_results[name], one_process[GRIDS_OF_2[name][2]])


@pytest.mark.parametrize("name", GRIDS_OF_4)
def test_four_processes_equal_one(name, one_process, four_processes):
    for rank_results in four_processes:
        check_equal(rank_results[name], one_process[GRIDS_OF_4[name][2]])


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_process_is_the_objective_written_down(variant, one_process):
    found, plain = one_process[variant], one_process["plain"][variant]
    assert found["losses"][0] == pytest.approx(plain["loss"], rel=1e-6)
    assert found["norms"][0] == pytest.approx(plain["norm"], rel=1e-5)
    for name, gradient in plain["gradients"].items():
        error = (found["gradients"][name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, f"gradient of {name} is off by {error:.1e}"


def test_the_reference_is_worth_comparing_with(one_process):
    for variant in VARIANTS:
        result = one_process[variant]
        assert len({round(loss, 3) for loss in result["losses"]}) == STEPS, variant
        assert len({round(norm, 3) for norm in result["norms"]}) == STEPS, variant
        assert all(gradient.norm() > 0 for gradient in result["gradients"].values()), variant
        density, executed = result["executed"][0]
        assert 0 < executed[1] <= density[1] < 1, variant
