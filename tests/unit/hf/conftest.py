"""No test here may reach for the network, nor write into the user's Hugging Face cache."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from skipmega.parallel.grid import ParallelGrid
from support.hf_modules import remote_code_in
from support.one_process import grid_of_one

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def private_module_cache(tmp_path: Path) -> Iterator[None]:
    """Remote code is copied to, and imported from, a folder of the test."""
    with remote_code_in(tmp_path / "modules"):
        yield


@pytest.fixture
def grid() -> Iterator[ParallelGrid]:
    """Ended after each test, some of which end it themselves."""
    with grid_of_one() as grid:
        yield grid
