"""From what was seen to the numbers of a record."""

from typing import Any

import pytest
import torch

from skipmega.config import RunConfig, build_config
from skipmega.models.flops import training_flops_per_token
from skipmega.training.metrics import (
    HeldOutAlarms,
    RoutingAlarms,
    StepMeter,
    executed_shares,
    padding_share,
    peak_memory_gib,
    routing_numbers,
    speed_numbers,
)
from skipmega.training.sums import Averages


def make_config(peak: float | None = None, **routing: Any) -> RunConfig:
    return build_config(
        {
            "model": {"num_layers": 4, "vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4},
            "data": {"sequence_length": 100},
            "training": {"global_batch_size": 8},
            "logging": {"peak_tflops": peak},
            "routing": routing,
        },
        source="test",
    )


def saw(**lists: list[float]) -> Averages:
    """By layer; what is not given is zero, as for layers without a router."""
    names = (
        "density", "executed", "computed", "moved", "entropy", "router_gradient", "fullest_group",
        "fullest_rank",
    )  # fmt: skip
    by_layer = {name: lists.get(name, [0.0] * 4) for name in names}
    return Averages(loss=2.0, learnt=7800.0, stage_seconds=[0.0], **by_layer)


SEEN = saw(
    density=[0.0, 0.5, 0.8, 0.0],
    executed=[0.0, 0.5, 0.6, 0.0],
    computed=[0.0, 0.625, 0.6, 0.0],
    entropy=[0.0, 0.69, 0.1, 0.0],
    fullest_group=[0.0, 1.0, 0.9, 0.0],
    fullest_rank=[0.0, 0.5, 0.75, 0.0],
)


def test_routing_is_reported_by_routed_layer() -> None:
    numbers = routing_numbers(make_config(), SEEN)
    assert numbers.pop("routed_layers") == [1, 2]
    expected = {
        "density": [0.5, 0.8],
        "dropped": [0.0, 0.25],  # 0.2 of 0.8 that were chosen
        "padded": [0.2, 0.0],  # 0.125 of 0.625 rows
        "entropy": [0.69, 0.1],
        "group_imbalance": [2.0, 1.5],
        "rank_imbalance": [1.0, 1.25],
    }
    assert {name: pytest.approx(values) for name, values in expected.items()} == numbers


def test_other_routed_layers_are_picked_by_their_number() -> None:
    config = make_config(dense_first=0, dense_last=0, every=3)
    numbers = routing_numbers(config, saw(density=[0.1, 0.2, 0.3, 0.4]))
    assert (numbers["routed_layers"], numbers["density"]) == ([0, 3], [0.1, 0.4])


def test_a_dense_run_reports_empty_lists() -> None:
    assert set(map(tuple, routing_numbers(make_config(router="always"), SEEN).values())) == {()}


def test_where_nothing_ran_nothing_was_dropped_or_padded_or_uneven() -> None:
    numbers = routing_numbers(make_config(), saw())
    for name in ("dropped", "group_imbalance", "rank_imbalance"):
        assert numbers[name] == [0.0, 0.0]
    assert numbers["density"] == [0.0, 0.0]


def test_slots_that_nobody_took_are_all_padding() -> None:
    assert routing_numbers(make_config(), saw(computed=[0.0, 0.5, 0.5, 0.0]))["padded"] == [1.0, 1.0]


def test_rounding_never_reports_a_negative_share() -> None:
    seen = saw(
        density=[0.0, 0.5, 0.5, 0.0], executed=[0.0, 0.5 + 1e-7, 0.5, 0.0], computed=[0.0, 0.5, 0.5, 0.0]
    )
    numbers = routing_numbers(make_config(), seen)
    assert numbers["dropped"] == [0.0, 0.0]
    assert numbers["padded"] == [0.0, 0.0]


def test_what_was_computed_is_what_ran_or_everything() -> None:
    assert executed_shares(make_config(), SEEN) == {1: 0.5, 2: 0.6}
    assert executed_shares(make_config(gradient="dense"), SEEN) == {1: 1.0, 2: 1.0}
    assert executed_shares(make_config(router="highway"), SEEN) == {1: 1.0, 2: 1.0}
    assert executed_shares(make_config(router="always"), SEEN) == {}


def test_speed_counts_the_whole_job_and_flops_each_device() -> None:
    config = make_config(peak=0.5)
    numbers = speed_numbers(config, SEEN, steps=10, seconds=4.0, devices=2)
    assert numbers["tokens_per_second"] == 2000
    assert numbers["seconds_per_step"] == 0.4
    dense = 2000 * training_flops_per_token(config) / 2 / 1e12
    executed = 2000 * training_flops_per_token(config, {1: 0.5, 2: 0.6}) / 2 / 1e12
    assert executed < dense
    assert numbers["dense_tflops"] == pytest.approx(dense)
    assert numbers["executed_tflops"] == pytest.approx(executed)
    assert numbers["mfu"] == pytest.approx(executed / 0.5)


def test_padding_is_what_has_nothing_to_learn() -> None:
    assert padding_share(make_config(), SEEN, steps=10) == pytest.approx(200 / 8000)


def test_without_a_stated_peak_there_is_no_mfu() -> None:
    assert "mfu" not in speed_numbers(make_config(), SEEN, steps=1, seconds=1.0, devices=1)


def alarms_of(config: RunConfig, *histories: list[float]) -> list[list[str]]:
    """Messages at each record; each density of layers 1 and 2."""
    alarms = RoutingAlarms(config)
    return [alarms.check(saw(density=[0.0, *both, 0.0]), 1.0) for both in histories]


def test_an_alarm_names_the_layer_what_it_does_and_the_target() -> None:
    ((dead,), (everybody,)) = alarms_of(make_config(density=0.5), [0.004, 0.5], [0.5, 0.996])
    for part in ("layer 1 is dead", "0.4% of the tokens chose it", "routing.density is 50.0%"):
        assert part in dead
    for part in ("layer 2 is always on", "99.6% of the tokens chose it", "routing.density is 50.0%"):
        assert part in everybody


def test_an_alarm_rings_once_and_again_after_it_has_cleared() -> None:
    well, dead, full = [0.5, 0.5], [0.0, 0.5], [1.0, 0.5]
    rung = alarms_of(make_config(density=0.5), well, dead, dead, well, dead, full, well, full)
    assert [len(messages) for messages in rung] == [0, 1, 0, 0, 1, 0, 0, 1]


def test_nobody_rings_while_the_density_warms_up() -> None:
    alarms, full = RoutingAlarms(make_config(density=0.5)), saw(density=[0.0, 1.0, 1.0, 0.0])
    assert [len(alarms.check(full, warmed)) for warmed in (0.0, 0.875, 1.0)] == [0, 0, 2]


def test_layers_ring_each_for_itself() -> None:
    rung = alarms_of(make_config(density=0.5), [0.0, 0.5], [0.0, 1.0], [0.0, 0.0], [0.0, 0.5], [0.0, 0.0])
    assert [[message.split(":")[0] for message in messages] for messages in rung] == [
        ["layer 1 is dead"], ["layer 2 is always on"], [], [], ["layer 2 is dead"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("density", "share", "rings"),
    [
        (0.5, 0.011, False),
        (0.5, 0.009, True),  # a fiftieth of the target
        (0.5, 0.989, False),
        (0.5, 0.991, True),
        (0.125, 0.0026, False),
        (0.125, 0.0024, True),
        (0.9, 0.997, False),  # close to everybody, as it should be
        (0.9, 0.9985, True),
        (1.0, 1.0, False),
        (1.0, 0.0, False),
    ],
)
def test_how_far_is_too_far_depends_on_the_target(density: float, share: float, rings: bool) -> None:
    ((*messages,),) = alarms_of(make_config(density=[density, 0.5]), [share, 0.5])
    assert bool(messages) == rings


@pytest.mark.parametrize(("router", "share"), [("highway", 1.0), ("never", 0.0)])
def test_routers_that_decide_nothing_ring_nothing(router: str, share: float) -> None:
    assert alarms_of(make_config(router=router), [share, share]) == [[]]


def test_the_timer_leaves_out_what_is_not_training() -> None:
    now = 100.0
    timer = StepMeter(lambda: now)
    now += 3
    timer.pause()
    now += 50
    timer.resume()
    now += 2
    assert timer.read() == 5
    now += 7
    assert timer.read() == 7


def test_peak_memory_is_this_process_s() -> None:
    assert 0.05 < peak_memory_gib(torch.device("cpu")) < 64


def test_a_held_out_density_far_from_its_target_is_told_once() -> None:
    alarms = HeldOutAlarms(make_config(density=0.25))
    near, far = saw(density=[0.0, 0.3, 0.12, 0.0]), saw(density=[0.0, 0.2, 0.01, 0.0])
    assert alarms.check(near) == []
    (message,) = alarms.check(far)
    for part in ("layer 2 executes 1.0% of the held-out", "its target is 25.0%", "routing.eval_density"):
        assert part in message
    assert alarms.check(far) == []


def test_a_held_out_density_is_held_against_the_one_of_evaluation() -> None:
    alarms = HeldOutAlarms(make_config(density=0.25, eval_density=0.75))
    assert alarms.check(saw(density=[0.0, 0.75, 0.75, 0.0])) == []


def test_a_dense_model_has_no_density_to_hold() -> None:
    assert HeldOutAlarms(make_config(router="always")).check(saw()) == []
