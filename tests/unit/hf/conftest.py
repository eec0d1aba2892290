"""No test here may reach for the network, nor write into the user's Hugging Face cache."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from skipmega.parallel.grid import ParallelGrid, create_grid, end_communication
from skipmega.parallel.process import ProcessInfo

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def private_module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remote code is copied to, and imported from, a folder of the test."""
    cache = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))


@pytest.fixture
def grid() -> Iterator[ParallelGrid]:
    """The grid of one process, ended after the test, the launcher's variables that it sets taken back."""
    before = dict(os.environ)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield create_grid(ProcessInfo(rank=0, world_size=1, local_rank=0, launcher="none"))
    end_communication()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)
