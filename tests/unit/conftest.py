"""What unit tests share."""

from collections.abc import Iterator

import pytest

from skipmega.parallel.grid import ParallelGrid
from support.one_process import grid_of_one


@pytest.fixture(scope="module")
def grid() -> Iterator[ParallelGrid]:
    """See :func:`support.one_process.grid_of_one`; ended after the module."""
    with grid_of_one() as grid:
        yield grid
