"""The spine: the same model, data and seed give the same result on every grid."""

import pytest
import torch

from support.steps import plain_step, tiny_config, train_tiny
from support.worlds import run_world

STEPS = 3
ADAFACTOR = {"name": "adafactor", "gradient_clip": 0.0}
RANK_BY_RANK = {"micro_batch_size": 2}  # what ranks or remembers tokens of one rank's micro-batch
VARIANTS = {
    "adamw": {},
    "untied-swiglu-dropless": {
        "model": {"tie_embeddings": False, "activation": "swiglu", "num_layers": 5},  # stages of 3 and 2
        "routing": {"capacity_factor": None},
    },
    "adafactor": {"optimizer": ADAFACTOR},
    "router-rate": {"optimizer": ADAFACTOR, "routing": {"router_learning_rate": 2.0}},
    "quantile": {"routing": {"router": "quantile"}, "training": RANK_BY_RANK},
    "quantile-running": {
        "routing": {"router": "quantile", "quantile_from": "running", "eval_density": 0.3},
        "training": RANK_BY_RANK,
    },
    "mixture-of-depths": {
        "routing": {
            "router": "topk", "stand_in": "predictor", "stand_in_weight": 0.5, "z_loss_weight": 0.1,
            "keys_values": "executed", "group_size": None, "density": 0.4, "eval_density": 0.3,
        },
        "training": RANK_BY_RANK,
    },
    "coefficient": {"routing": {"density_control": "coefficient", "coefficient_rate": 2.0}},
    "bias-mlp": {
        "routing": {"router": "sigmoid", "density_control": "bias", "bias_rate": 1.0, "wrap": "mlp"},
        "training": RANK_BY_RANK,
    },
    "random-attention": {"routing": {"router": "random", "wrap": "attention", "density": 0.3}},
    "warmup": {"routing": {"router": "quantile", "density_warmup_steps": 2}, "training": RANK_BY_RANK},
}  # fmt: skip
LAST_STEPS = ("coefficient", "quantile", "adamw")  # no threshold moves
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
    "PP2-router-rate": (1, 2, "router-rate"),
    "DP2-router-rate": (1, 1, "router-rate"),
    "TP2-quantile": (2, 1, "quantile"),
    "PP2-quantile": (1, 2, "quantile"),
    "DP2-quantile": (1, 1, "quantile"),
    "TP2-quantile-running": (2, 1, "quantile-running"),
    "PP2-quantile-running": (1, 2, "quantile-running"),
    "DP2-quantile-running": (1, 1, "quantile-running"),
    "TP2-mixture-of-depths": (2, 1, "mixture-of-depths"),
    "PP2-mixture-of-depths": (1, 2, "mixture-of-depths"),
    "DP2-mixture-of-depths": (1, 1, "mixture-of-depths"),
    "TP2-coefficient": (2, 1, "coefficient"),
    "PP2-coefficient": (1, 2, "coefficient"),
    "DP2-coefficient": (1, 1, "coefficient"),
    "TP2-bias-mlp": (2, 1, "bias-mlp"),
    "PP2-bias-mlp": (1, 2, "bias-mlp"),
    "DP2-bias-mlp": (1, 1, "bias-mlp"),
    "TP2-random-attention": (2, 1, "random-attention"),
    "DP2-random-attention": (1, 1, "random-attention"),
    "PP2-warmup": (1, 2, "warmup"),
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
    "TP2-DP2-mixture-of-depths": (2, 1, "mixture-of-depths"),
    "PP2-DP2-coefficient": (1, 2, "coefficient"),
    "PP4-bias-mlp": (1, 4, "bias-mlp"),
}


def overrides_of(variant):
    return {"parallel": {"zero_stage": 2}} if variant == "zero2" else VARIANTS[variant]


def train_all(grids):
    return {
        name: train_tiny(tensor, pipeline, STEPS, overrides_of(variant))
        for name, (tensor, pipeline, variant) in grids.items()
    }


def integrated_errors(seen, config):
    """What the coefficients are after some steps."""
    routing = config.routing
    factors = dict.fromkeys(config.routed_layers, 0.0)
    for averages in seen:
        for layer in factors:
            error = averages.density[layer] - routing.density
            factors[layer] += routing.coefficient_rate * error * (abs(error) > routing.dead_band)
    return list(factors.values())


def train_and_write_down():
    trained = train_all({name: (1, 1, name) for name in VARIANTS})
    plain = {name: plain_step(overrides) for name, overrides in VARIANTS.items()}
    last = {}
    for name in LAST_STEPS:
        found = trained[name]
        factors = integrated_errors(found["seen"][:-1], tiny_config(VARIANTS[name]))
        last[name] = plain_step(VARIANTS[name], STEPS - 1, found["last_weights"], factors)
        last[name]["factors"] = factors
    return trained, plain, last


@pytest.fixture(scope="module")
def one_process():
    ((results, plain, last),) = run_world(train_and_write_down, 1)
    return {**results, "zero2": results["adamw"], "plain": plain, "last": last}


@pytest.fixture(scope="module")
def two_processes():
    return run_world(train_all, 2, GRIDS_OF_2, limit=240)


@pytest.fixture(scope="module")
def four_processes():
    return run_world(train_all, 4, GRIDS_OF_4, limit=240)


def check_gradients(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < tolerance, f"gradient of {name} is off by {error:.1e}"


def check_tensors(found, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_seen(found, expected, same_micro_batches):
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    numbers = ["density", "executed", "entropy", "fullest_group", "router_gradient"]
    for name in numbers + ["computed"] * same_micro_batches:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-6), name


def check_equal(found, expected):
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=1e-5, atol=0)
    same_micro_batches = found["same_micro_batches"]
    for pair in zip(
        found["seen"] + [found["held_out"]], expected["seen"] + [expected["held_out"]], strict=True
    ):
        check_seen(*pair, same_micro_batches)
    check_gradients(found["gradients"], expected["gradients"], 1e-4)
    check_tensors(found["weights"], expected["weights"])
    assert found["state"].keys() == expected["state"].keys()
    comparable = {
        name: tensor
        for name, tensor in expected["state"].items()
        if same_micro_batches or not name.endswith("quantiles")
    }
    check_tensors(found["state"], comparable)


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
    check_gradients(found["gradients"], plain["gradients"], 1e-5)
    for layer, norm in enumerate(found["seen"][0].router_gradient):
        gradient = plain["gradients"].get(f"layers.{layer}.router.weight", torch.zeros(1))
        assert norm == pytest.approx(gradient.norm().item(), rel=1e-4)


@pytest.mark.parametrize("variant", LAST_STEPS)
def test_so_is_the_last_step(variant, one_process):
    """The coefficients being the integrated errors of the steps before."""
    found, plain = one_process[variant], one_process["last"][variant]
    assert found["losses"][-1] == pytest.approx(plain["loss"], rel=1e-5)
    assert found["norms"][-1] == pytest.approx(plain["norm"], rel=1e-4)
    check_gradients(found["last_gradients"], plain["gradients"], 1e-4)
    if variant == "coefficient":
        assert all(abs(factor) > 0.02 for factor in plain["factors"]), "the penalty is felt"


def test_density_warms_up_from_one(one_process):
    seen = one_process["warmup"]["seen"]
    assert [averages.density[1:3] for averages in seen] == [[1.0, 1.0], [0.75, 0.75], [0.5, 0.5]]


def test_the_reference_is_worth_comparing_with(one_process):
    for variant in VARIANTS:
        result = one_process[variant]
        assert len({round(loss, 3) for loss in result["losses"]}) == STEPS, variant
        assert len({round(norm, 3) for norm in result["norms"]}) == STEPS, variant
        assert all(gradient.norm() > 0 for gradient in result["gradients"].values()), variant
        for averages in [*result["seen"], result["held_out"]]:
            shares = [(averages.executed[i], averages.density[i]) for i in (1, 2)]
            assert all(0 < executed <= density for executed, density in shares), variant
            assert variant == "warmup" or all(density < 1 for _, density in shares), variant
        state = result["state"]
        routed = {"1", "2", "3"} if variant == "untied-swiglu-dropless" else {"1", "2"}
        assert {name.split(".")[1] for name in state} == routed
        if variant in ("coefficient", "bias-mlp"):
            moved = "coefficient" if variant == "coefficient" else "threshold"
            assert all(state[f"layers.{layer}.{moved}"].abs() > 0.02 for layer in (1, 2))
