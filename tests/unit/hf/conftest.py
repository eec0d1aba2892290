"""No test here may reach for the network, nor write into the user's Hugging Face cache."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from skipmega.parallel.grid import ParallelGrid, create_grid, end_communication
from skipmega.parallel.process import ProcessInfo
from support.hf_modules import remote_code_in

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def private_module_cache(tmp_path: Path) -> Iterator[None]:
    """Remote code is copied to, and imported from, a folder of the test."""
    with remote_code_in(tmp_path / "modules"):
        yield


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
