"""A disk that is full for one of several processes: all of them stop, say the same and lose nothing."""

import resource
from pathlib import Path
from unittest import mock

import pytest

from skipmega.checkpoint.store import Checkpoint
from skipmega.config import load_config
from skipmega.errors import CheckpointError
from skipmega.launch import run
from skipmega.launch.environment import discover_process
from skipmega.parallel.grid import release_grid
from support.worlds import run_world

FULL_ON = 1  # does not write the log, and half of the tensors
# more than any other file of the run, less than its half of the tensors; in bytes
LARGEST_FILE = 65536
GRIDS = ["tensor_parallel", "pipeline_parallel"]

Outcome = tuple[str, list[str]]


def on_every_grid(config: Path, folder: Path) -> dict[str, Outcome]:
    return {grid: stop_fail_and_go_on(config, folder / grid, f"parallel.{grid}=2") for grid in GRIDS}


def stop_fail_and_go_on(config: Path, run_dir: Path, grid: str) -> Outcome:
    """One step, one that cannot be saved, and that one again: the error, and the checkpoints after it."""
    arguments = [f"run_dir={run_dir}", grid, "training.eval_interval=0", "checkpoint.retries=0"]
    process = discover_process()
    # one world for all starts
    with mock.patch.object(run, "end_communication", release_grid):
        run.pretrain(load_config(config, [*arguments, "training.stop_after=1"]), process)
        if process.rank == FULL_ON:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, resource.RLIM_INFINITY))
        with pytest.raises(CheckpointError) as failed:
            run.pretrain(load_config(config, [*arguments, "training.stop_after=2"]), process)
        left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        release_grid()
        run.pretrain(load_config(config, [*arguments, "training.stop_after=2"]), process)
    return str(failed.value), left


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("full_disk")


@pytest.fixture(scope="module")
def outcomes(tiny_config: Path, folder: Path) -> list[dict[str, Outcome]]:
    return run_world(on_every_grid, 2, tiny_config, folder)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_save_that_one_process_cannot_write(
    folder: Path, outcomes: list[dict[str, Outcome]], grid: str
) -> None:
    good = folder / grid / "checkpoints" / "step-00000001"
    for error, left in (outcome[grid] for outcome in outcomes):
        failed = good.with_name("step-00000002")
        assert error.startswith(f"could not save checkpoint {failed}: process {FULL_ON}: File too large")
        assert error.endswith(f"; the last good checkpoint is {good}")
        assert left == [good.name]
    assert Checkpoint.open(folder / grid).state["step"] == 2
