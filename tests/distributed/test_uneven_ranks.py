"""Ranks that execute everything beside ranks that execute nothing: no hang, and the result of one process."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

from support.parity import check_equal, names_of, on_each_grid
from support.steps import tiny_grid, train_tiny
from support.worlds import run_world

STEPS = 2
PATTERNS = {  # who executes, by sample [b] and position [s, 1]
    "nobody": lambda sample, position: (sample < 0) & (position < 0),
    "everybody": lambda sample, position: (sample >= 0) & (position >= 0),
    "one-token": lambda sample, position: (sample == 3) & (position == 21),
    "first-half": lambda sample, position: (sample >= 0) & (position < 32),
    "middle": lambda sample, position: (sample >= 0) & (position >= 16) & (position < 48),
    "two-of-four": lambda sample, position: (sample % 4 < 2) & (position >= 0),
}
# a pattern, and what else is set: balanced dispatch, skipping of the feed-forward network only, recomputation
GRIDS_OF_2 = """
TP2-SP first-half, TP2-SP one-token, TP2-SP nobody, TP2-SP everybody,
CP2 middle, CP2 one-token, CP2 nobody, CP2 everybody,
DP2 two-of-four, DP2 one-token, DP2 nobody, DP2-Z2 two-of-four, PP2 one-token, PP2 nobody,
TP2-SP first-half+balanced, TP2-SP one-token+balanced, TP2-SP nobody+balanced, TP2-SP everybody+balanced,
CP2 middle+balanced, CP2 one-token+balanced, DP2 two-of-four+balanced, DP2 one-token+balanced,
DP2 nobody+balanced, DP2 two-of-four+mlp+balanced, CP2 middle+balanced+full, TP2 one-token+balanced
"""
GRIDS_OF_4 = """
TP2-SP-CP2 one-token, TP2-SP-CP2 middle, TP2-SP-DP2 two-of-four, CP2-PP2 middle, CP2-DP2 one-token,
TP2-SP-CP2 one-token+balanced, TP2-SP-CP2 middle+balanced, TP2-SP-DP2 two-of-four+mlp+balanced,
CP2-DP2 middle+balanced, PP2-DP2 two-of-four+balanced
"""
ROUTING = {"router": "gumbel", "capacity_factor": None, "group_size": None}


@contextmanager
def decided(pattern: str) -> Iterator[None]:
    """Noise that outweighs every score, and yet leaves the routers a gradient."""

    def noise(key, layers, positions):
        execute = PATTERNS[pattern](key.samples, positions.unsqueeze(1))
        return torch.where(execute, 8.0, -8.0).expand(len(layers), -1, -1)

    with patch("skipmega.routing.state.logistic", noise):
        yield


def train(grid, parallel, variant):
    pattern, *more = variant.split("+")
    routing = ROUTING | {"dispatch": "balanced" if "balanced" in more else "local"}
    routing |= {"wrap": "mlp" if "mlp" in more else "layer"}
    overrides = {"routing": routing, "training": {"recompute": "full" if "full" in more else "none"}}
    with decided(pattern):
        return train_tiny(grid, parallel, STEPS, overrides)


def reference_of(name):
    return name.split()[1].replace("+balanced", "").replace("+full", "")


def train_all(grids):
    return on_each_grid(grids, train)


def train_alone():
    with tiny_grid({}) as grid:
        return {variant: train(grid, {}, variant) for variant in [*PATTERNS, "two-of-four+mlp"]}


@pytest.fixture(scope="module")
def one_process():
    (results,) = run_world(train_alone, 1)
    return results


@pytest.fixture(scope="module")
def two_processes():
    return run_world(train_all, 2, GRIDS_OF_2)


@pytest.fixture(scope="module")
def four_processes():
    return run_world(train_all, 4, GRIDS_OF_4)


@pytest.mark.parametrize("name", names_of(GRIDS_OF_2))
def test_two_processes_equal_one(name, one_process, two_processes):
    for results in two_processes:
        check_equal(results[name], one_process[reference_of(name)])


@pytest.mark.parametrize("name", names_of(GRIDS_OF_4))
def test_four_processes_equal_one(name, one_process, four_processes):
    for results in four_processes:
        check_equal(results[name], one_process[reference_of(name)])


def test_the_patterns_are_what_they_say(one_process):
    shares = {pattern: one_process[pattern]["seen"][0].executed[1] for pattern in PATTERNS}
    one = 1 / (8 * 64)
    assert shares == {
        "nobody": 0, "everybody": 1, "one-token": one, "first-half": 0.5, "middle": 0.5, "two-of-four": 0.5,
    }  # fmt: skip
    for pattern in PATTERNS:
        gradients = one_process[pattern]["gradients"]
        assert gradients["layers.1.router.weight"].norm() > 0, "the density penalty is felt"
        assert (gradients["layers.1.mlp.up.weight"].norm() > 0) == (pattern != "nobody")


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("DP2 two-of-four+balanced", 0.25),  # half of what one of two ranks executes
        ("TP2-SP first-half+balanced", 0.25),
        ("CP2 one-token+balanced", 0),
        ("TP2-SP everybody+balanced", 0),
        ("DP2 two-of-four", 0),
    ],
)
def test_no_more_tokens_move_than_must(name, moved, two_processes):
    assert two_processes[0][name]["seen"][0].moved[1:3] == pytest.approx([moved, moved])
