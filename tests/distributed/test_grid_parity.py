"""The spine: the same model, data and seed give the same result on every grid."""

import pytest
import torch

from support.parity import check_gradients, names_of
from support.steps import plain_step, tiny_config
from support.variants import STEPS, VARIANTS, check, train_all, train_alone
from support.worlds import run_world

LAST_STEPS = ("coefficient", "quantile", "adamw")  # no threshold moves
# What they cut, then the variant: see support.parity.names_of
GRIDS_OF_2 = """
TP2 adamw, PP2 adamw, DP2 adamw, DP2-Z2 adamw, TP2-SP adamw, CP2 adamw,
TP2-SP untied-swiglu-dropless, CP2 untied-swiglu-dropless, PP2 untied-swiglu-dropless,
DP2 adafactor, TP2-SP adafactor, CP2 adafactor, PP2 router-rate,
DP2 quantile, TP2-SP quantile, CP2 quantile, PP2-V2 quantile, PP2-V2 deep, TP2-SP ranked,
TP2 mixture-of-depths, DP2 mixture-of-depths, CP2 coefficient, PP2 coefficient, TP2-SP bias-mlp, CP2 bias-mlp,
TP2-SP random-attention, PP2 warmup, TP2-SP dense-gradient, TP2-SP bf16, CP2 bf16,
TP2-SP bf16-still, CP2 bf16-still,
DP2-Z3 adamw, DP2-Z3 recompute
"""
GRIDS_OF_4 = """
TP2-PP2 adamw, PP2-DP2-Z2 adamw, CP2-PP2 adamw, CP2-DP2 adamw, TP4-SP many-heads, PP4-V2 deep,
TP2-SP-CP2 untied-swiglu-dropless, TP2-SP-DP2 adafactor, PP2-DP2 coefficient, TP2-SP-DP2-Z3 adamw
"""
# with these, all
MORE_GRIDS_OF_2 = """
TP2 untied-swiglu-dropless, DP2 untied-swiglu-dropless, TP2 adafactor, DP2 router-rate, TP2 quantile,
PP2 quantile, TP2 quantile-running, PP2 quantile-running, DP2 quantile-running, TP2-SP quantile-running,
CP2 ranked, PP2 mixture-of-depths, TP2 coefficient, DP2 coefficient, TP2 bias-mlp, PP2 bias-mlp, DP2 bias-mlp,
TP2 random-attention, DP2 random-attention, CP2 random-attention, PP2-V4 deep, CP2 dense-gradient,
CP2-Z2 adamw, TP2 bf16, PP2-V2 bf16, DP2 bf16, DP2-Z2 bf16, DP2-Z3 bf16, TP2 bf16-still,
PP2-V2 bf16-still, DP2 bf16-still, DP2-Z3 bf16-still, DP2-Z3 untied-swiglu-dropless,
CP2-Z3 adamw, TP2-SP recompute, CP2 recompute-attention, PP2-V2 recompute, TP2-SP recompute-cheap,
PP2 recompute-cheap, DP2-Z3 recompute-cheap
"""
MORE_GRIDS_OF_4 = """
TP2-DP2 adamw, PP2-DP2 adamw, PP4 adamw, DP4 adamw, TP2-SP-CP2 adamw, TP2-SP-PP2 adamw, CP4 adamw,
TP2-PP2 untied-swiglu-dropless, CP2-PP2 untied-swiglu-dropless, TP2-DP2 adafactor, CP2-DP2 adafactor,
TP2-DP2 mixture-of-depths, PP4 bias-mlp, TP2-SP-CP2 bias-mlp, TP2-SP-CP2 quantile, TP2-SP-DP2 quantile,
PP2-V2-DP2 deep, TP2-SP-PP2-V2 deep, CP2-PP2-V2 deep, TP2-SP-CP2 bf16, TP2-SP-PP2-V2 bf16,
TP2-SP-CP2 bf16-still,
TP2-DP2-Z3 adamw, TP2-DP2-Z3 recompute-attention, TP2-SP-CP2-Z3 recompute
"""
GRIDS_OF_8 = """
TP2-SP-CP2-PP2 adamw, TP2-PP2-DP2-Z2 adamw, TP2-SP-PP2-DP2 adamw, CP2-PP2-DP2 adamw, PP4-DP2 adamw,
TP4-SP-CP2 many-heads, TP4-SP-PP2 many-heads, TP2-SP-CP2-PP2 untied-swiglu-dropless, TP2-SP-CP2-DP2 quantile,
CP4-DP2 adafactor, PP4-V2-DP2 deep, TP2-SP-PP2-V2-DP2 deep, TP2-SP-CP2-PP2 bf16
"""


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
    trained = train_alone(VARIANTS)
    plain = {
        name: plain_step(overrides) for name, overrides in VARIANTS.items() if not name.startswith("bf16")
    }
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
    return {**results, "plain": plain, "last": last}


@pytest.fixture(scope="module")
def two_processes():
    return run_world(train_all, 2, GRIDS_OF_2, limit=240)


@pytest.fixture(scope="module")
def four_processes():
    return run_world(train_all, 4, GRIDS_OF_4, limit=240)


@pytest.mark.parametrize("name", names_of(GRIDS_OF_2))
def test_two_processes_equal_one(name, one_process, two_processes):
    check(name, one_process, two_processes)


@pytest.mark.parametrize("name", names_of(GRIDS_OF_4))
def test_four_processes_equal_one(name, one_process, four_processes):
    check(name, one_process, four_processes)


@pytest.fixture(scope="module")
def every_two_processes():
    return run_world(train_all, 2, MORE_GRIDS_OF_2, limit=280)


@pytest.fixture(scope="module")
def every_four_processes():
    return run_world(train_all, 4, MORE_GRIDS_OF_4, limit=280)


@pytest.fixture(scope="module")
def every_eight_processes():
    return run_world(train_all, 8, GRIDS_OF_8, limit=280)


@pytest.mark.every_grid
@pytest.mark.parametrize("name", names_of(MORE_GRIDS_OF_2))
def test_every_two_processes_equal_one(name, one_process, every_two_processes):
    check(name, one_process, every_two_processes)


@pytest.mark.every_grid
@pytest.mark.parametrize("name", names_of(MORE_GRIDS_OF_4))
def test_every_four_processes_equal_one(name, one_process, every_four_processes):
    check(name, one_process, every_four_processes)


@pytest.mark.every_grid
@pytest.mark.parametrize("name", names_of(GRIDS_OF_8))
def test_every_eight_processes_equal_one(name, one_process, every_eight_processes):
    check(name, one_process, every_eight_processes)


def test_zero_3_leaves_nothing_whole(two_processes, four_processes):
    """Or its grids above would show nothing."""
    for rank_results in two_processes + four_processes:
        for name, found in rank_results.items():
            assert found["parameters_kept"] == ("Z3" not in name), name


@pytest.mark.parametrize("variant", sorted(name for name in VARIANTS if not name.startswith("bf16")))
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
            assert all(0 < executed <= density + 1e-6 for executed, density in shares), variant
            assert variant == "warmup" or all(density < 1 for _, density in shares), variant
        state = result["state"]
        routed = tiny_config(VARIANTS[variant]).routed_layers
        assert {int(name.split(".")[1]) for name in state} == set(routed)
        if variant in ("coefficient", "bias-mlp"):
            moved = "coefficient" if variant == "coefficient" else "threshold"
            assert all(state[f"layers.{layer}.{moved}"].abs() > 0.02 for layer in (1, 2))
