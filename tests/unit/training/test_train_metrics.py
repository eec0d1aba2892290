"""From what was seen to the numbers of a record."""

import pytest
import torch

from skipmega.config import RunConfig, build_config
from skipmega.models.flops import training_flops_per_token
from skipmega.training import metrics
from skipmega.training.engine import Averages
from skipmega.training.metrics import StepTimer, peak_memory_gib, routing_numbers, speed_numbers


def make_config(peak: float | None = None) -> RunConfig:
    return build_config(
        {
            "model": {"num_layers": 4, "vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4},
            "data": {"sequence_length": 100},
            "training": {"global_batch_size": 8},
            "logging": {"peak_tflops": peak},
        },
        source="test",
    )


# the engine reports zero for layers without a router
SEEN = Averages(loss=2.0, density=[0.0, 0.5, 0.8, 0.0], executed=[0.0, 0.5, 0.6, 0.0])


def test_routing_is_reported_by_routed_layer() -> None:
    numbers = routing_numbers(make_config(), SEEN)
    assert numbers["routed_layers"] == [1, 2]
    assert numbers["density"] == [0.5, 0.8]
    assert numbers["dropped"] == pytest.approx([0.0, 0.25])


def test_nothing_chosen_is_nothing_dropped() -> None:
    silent = Averages(loss=2.0, density=[0.0] * 4, executed=[0.0] * 4)
    assert routing_numbers(make_config(), silent)["dropped"] == [0.0, 0.0]


def test_rounding_never_reports_a_negative_drop() -> None:
    seen = Averages(loss=2.0, density=[0.0, 0.5, 0.5, 0.0], executed=[0.0, 0.5 + 1e-7, 0.5, 0.0])
    assert routing_numbers(make_config(), seen)["dropped"] == [0.0, 0.0]


def test_speed_counts_the_whole_job_and_flops_each_device() -> None:
    config = make_config(peak=0.5)
    numbers = speed_numbers(config, SEEN, steps=10, seconds=4.0, devices=2)
    assert numbers["tokens_per_second"] == 2000
    assert numbers["seconds_per_step"] == 0.4
    dense = 2000 * training_flops_per_token(config) / 2 / 1e12
    executed = 2000 * training_flops_per_token(config, [1.0, 0.5, 0.6, 1.0]) / 2 / 1e12
    assert executed < dense
    assert numbers["dense_tflops"] == pytest.approx(dense)
    assert numbers["executed_tflops"] == pytest.approx(executed)
    assert numbers["mfu"] == pytest.approx(executed / 0.5)


def test_without_a_stated_peak_there_is_no_mfu() -> None:
    assert "mfu" not in speed_numbers(make_config(), SEEN, steps=1, seconds=1.0, devices=1)


def test_the_timer_leaves_out_what_is_not_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    timer = StepTimer()
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
