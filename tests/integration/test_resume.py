"""A run that was stopped goes on, in new processes, as if it had not been."""

from pathlib import Path

import pytest
import torch

from skipmega.checkpoint.store import Checkpoint
from support.tiny_run import (
    HALF,
    RUNS_OF_1,
    RUNS_OF_2,
    STEPS,
    TORCHRUN_2,
    pretrain_each,
    records,
    run_command,
)
from support.worlds import run_world

MOVES = [("TP2", "DP2"), ("CP2", "PP2"), ("DP2", "zero3"), ("zero3", "DP2")]  # goes on, was stopped
CUT = ("TP2", "PP2", "CP2", "zero3")
REPEATABLE = ("loss", "grad_norm", "learning_rate", "density", "tokens")


@pytest.fixture(scope="module")
def cut_runs_resumed(tiny_config: Path, runs_of_2: Path) -> Path:
    """``runs_of_2`` after those of CUT were resumed and A-from-B took over where B was stopped."""
    moved = [
        [
            f"run_dir={runs_of_2}/{name}-from-{stopped}",
            f"checkpoint.resume={runs_of_2}/{stopped}-stopped/checkpoints/step-{HALF:08d}",
            *RUNS_OF_2[name],
        ]
        for name, stopped in MOVES
    ]
    resumed = [[f"run_dir={runs_of_2}/{name}-stopped", *RUNS_OF_2[name]] for name in CUT]
    run_world(pretrain_each, 2, tiny_config, [*resumed, *moved], limit=240)
    return runs_of_2


def test_one_process_through_the_script(tiny_config: Path, runs_of_1: Path) -> None:
    run = runs_of_1 / "adamw-stopped"
    output = run_command("pretrain/pretrain.py", tiny_config, f"run_dir={run}", *RUNS_OF_1["adamw"])
    assert f"attempt 2, from {run}/checkpoints/step-{HALF:08d}" in output
    check_identical(run, runs_of_1 / "adamw")


def test_two_processes_through_torchrun(tiny_config: Path, runs_of_2: Path) -> None:
    run = runs_of_2 / "DP2-stopped"
    output = run_command(
        *TORCHRUN_2, "pretrain/pretrain.py", tiny_config, f"run_dir={run}", *RUNS_OF_2["DP2"]
    )
    assert "data 2" in output
    assert "ZeRO 1" in output
    check_identical(run, runs_of_2 / "DP2")


def test_adafactor(tiny_config: Path, runs_of_1: Path) -> None:
    run = runs_of_1 / "adafactor-stopped"
    run_world(pretrain_each, 1, tiny_config, [[f"run_dir={run}", *RUNS_OF_1["adafactor"]]])
    check_identical(run, runs_of_1 / "adafactor")


@pytest.mark.parametrize("name", CUT)
def test_a_cut_model(name: str, cut_runs_resumed: Path) -> None:
    check_identical(cut_runs_resumed / f"{name}-stopped", cut_runs_resumed / name)


@pytest.mark.parametrize(("name", "stopped"), MOVES)
def test_on_another_grid(name: str, stopped: str, cut_runs_resumed: Path) -> None:
    expected = records(cut_runs_resumed / stopped, "train")
    found = records(cut_runs_resumed / f"{name}-from-{stopped}", "train")
    assert list(found) == list(range(HALF + 1, STEPS + 1))
    for step, record in found.items():
        for field in ("loss", "grad_norm"):
            torch.testing.assert_close(record[field], expected[step][field], rtol=1e-5, atol=0)


def check_identical(resumed: Path, uninterrupted: Path) -> None:
    """Everything that was recorded but times, the final weights and the routers' state, to the last bit."""
    assert list(records(resumed, "start")) == [0, HALF]
    expected, found = records(uninterrupted, "train"), records(resumed, "train")
    assert list(expected) == list(found) == list(range(1, STEPS + 1))
    for step, record in expected.items():
        assert {name: found[step][name] for name in REPEATABLE} == {n: record[n] for n in REPEATABLE}, step
    assert records(resumed, "eval") == records(uninterrupted, "eval")
    last, whole = Checkpoint.open(resumed), Checkpoint.open(uninterrupted)
    tensors, final = last.read_weights() | last.read_routing(), whole.read_weights() | whole.read_routing()
    assert tensors.keys() == final.keys()
    for name, tensor in final.items():
        assert torch.equal(tensors[name], tensor), name
