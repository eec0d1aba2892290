"""The learning rate as a function of the step."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipmega.config import RunConfig, build_config
from skipmega.training.schedule import learning_rate

PEAK = 2e-3


def make_config(
    name: str, warmup: int, steps: int, floor: float = 0.1, decay_steps: int | None = None, **training: int
) -> RunConfig:
    return build_config(
        {
            "optimizer": {"learning_rate": PEAK},
            "schedule": {
                "name": name, "warmup_steps": warmup, "final_ratio": floor, "decay_steps": decay_steps,
            },
            "training": {"steps": steps, **training},
        },
        source="test",
    )  # fmt: skip


NAMES = st.sampled_from(["cosine", "inverse_sqrt", "constant"])
WARMUPS = st.integers(0, 30)
STEPS = st.integers(1, 60)
FLOORS = st.just(0.0) | st.floats(1e-6, 1)


@given(name=NAMES, warmup=WARMUPS, steps=STEPS, floor=FLOORS, decay=st.none() | st.integers(1, 80))
def test_it_rises_linearly_to_the_peak_then_never_again(
    name: str, warmup: int, steps: int, floor: float, decay: int | None
) -> None:
    config = make_config(name, warmup, steps, floor, decay)
    rates = [learning_rate(config, step) for step in range(120)]
    for step in range(warmup):
        assert rates[step] == pytest.approx(PEAK * (step + 1) / warmup)
    peak_at = max(warmup - 1, 0)
    assert rates[peak_at] == pytest.approx(PEAK)
    after = rates[peak_at:]
    assert all(b <= a for a, b in pairwise(after))
    assert all(0 < rate <= PEAK * (1 + 1e-12) or floor == 0 for rate in rates)


@given(warmup=WARMUPS, steps=STEPS, floor=st.floats(0, 1))
def test_cosine_is_half_way_in_the_middle_and_stays_at_the_floor(
    warmup: int, steps: int, floor: float
) -> None:
    config = make_config("cosine", warmup, steps + warmup, floor)
    end = warmup + steps
    if steps % 2 == 0:
        assert learning_rate(config, warmup + steps // 2) == pytest.approx(PEAK * (1 + floor) / 2)
    for step in (end, end + 1, end + 1000):
        assert learning_rate(config, step) == pytest.approx(PEAK * floor)


def test_decay_steps_move_the_end_of_the_cosine() -> None:
    assert learning_rate(make_config("cosine", 10, 1000, 0.1, decay_steps=50), 50) == pytest.approx(
        0.1 * PEAK
    )
    assert learning_rate(make_config("cosine", 10, 50, 0.1), 50) == pytest.approx(0.1 * PEAK)
    assert learning_rate(make_config("cosine", 10, 1000, 0.1), 50) > 0.9 * PEAK


@given(warmup=st.integers(1, 30), factor=st.integers(2, 5))
def test_inverse_sqrt_halves_when_the_steps_done_quadruple(warmup: int, factor: int) -> None:
    config = make_config("inverse_sqrt", warmup, 10)
    done = warmup * factor**2
    assert learning_rate(config, done - 1) == pytest.approx(PEAK / factor)
    assert learning_rate(config, warmup) == pytest.approx(PEAK * math.sqrt(warmup / (warmup + 1)))


def test_stopping_early_does_not_change_the_schedule() -> None:
    whole, stopped = make_config("cosine", 5, 100), make_config("cosine", 5, 100, stop_after=20)
    assert [learning_rate(whole, step) for step in range(20)] == [
        learning_rate(stopped, s) for s in range(20)
    ]
