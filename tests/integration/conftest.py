"""Data and trained runs that the integration tests share; each is made when a test first asks for it."""

from pathlib import Path

import pytest

from support.tiny_run import HALF, RUNS_OF_1, RUNS_OF_2, pretrain_each, write_tiny_run
from support.worlds import run_world


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration file of the tiny run, beside its tokenizer and data; give it a ``run_dir``."""
    return write_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def runs_of_1(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole run NAME and a run NAME-stopped after half, for every name of RUNS_OF_1."""
    folder = tmp_path_factory.mktemp("runs_of_1")
    run_world(pretrain_each, 1, tiny_config, whole_and_stopped(folder, RUNS_OF_1))
    return folder


@pytest.fixture(scope="session")
def runs_of_2(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two processes, for every name of RUNS_OF_2."""
    folder = tmp_path_factory.mktemp("runs_of_2")
    run_world(pretrain_each, 2, tiny_config, whole_and_stopped(folder, RUNS_OF_2))
    return folder


def whole_and_stopped(folder: Path, runs: dict[str, list[str]]) -> list[list[str]]:
    """The overrides of both, for every run."""
    both = []
    for name, overrides in runs.items():
        both.append([f"run_dir={folder / name}", *overrides])
        both.append([f"run_dir={folder / name}-stopped", f"training.stop_after={HALF}", *overrides])
    return both
