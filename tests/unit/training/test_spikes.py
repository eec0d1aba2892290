"""Which losses stand out."""

import math

import pytest

from skipmega.config import build_config
from skipmega.training.spikes import SpikeDetector


def detector(recent: list[float], warmup: int = 0, **training: float) -> SpikeDetector:
    values = {"training": training, "routing": {"density_warmup_steps": warmup}}
    return SpikeDetector(build_config(values, source="test"), recent)


def test_the_threshold_is_the_mean_and_some_deviations() -> None:
    judge = detector([3.0, 5.0, 4.0], spike_window=6, spike_sigmas=2.0)  # mean 4, deviation 1
    assert judge.problem(6.0, 10) is None
    assert judge.problem(1.0, 10) is None, "a fall is no fault"
    problem = judge.problem(6.01, 10)
    assert problem is not None
    assert "the loss of step 11, 6.0100, is a spike: more than 6.0000, the mean of 3 before it" in problem


def test_half_a_window_is_waited_for() -> None:
    recent = [4.0, 4.1]
    judge = detector(recent, spike_window=6, spike_sigmas=2.0)
    assert judge.problem(1000.0, 2) is None
    judge.accept(4.0, 2)
    assert judge.problem(1000.0, 3) is not None
    for step in range(3, 20):
        judge.accept(4.0, step)
    assert len(recent) == 6


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_one_at_any_time(loss: float) -> None:
    assert detector([], spike_sigmas=0.0).problem(loss, 0) == f"the loss of step 1 is {loss}"


def test_it_can_be_switched_off() -> None:
    assert detector([4.0] * 128, spike_sigmas=0.0).problem(1000.0, 200) is None


def test_losses_jump_while_the_density_warms_up() -> None:
    recent: list[float] = []
    judge = detector(recent, warmup=100, spike_window=4)
    judge.accept(4.0, 50)
    assert recent == []
    assert detector([4.0] * 4, warmup=100, spike_window=4).problem(1000.0, 50) is None
