"""The grid of one process, which everything built of megatron-core's layers asks for."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from skipmega.parallel.grid import ParallelGrid, create_grid, end_communication
from skipmega.parallel.process import ProcessInfo


@contextmanager
def grid_of_one() -> Iterator[ParallelGrid]:
    """On one thread; afterwards communication has ended, and the launcher's variables are taken back."""
    before = dict(os.environ)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield create_grid(ProcessInfo(rank=0, world_size=1, local_rank=0, launcher="none"))
    end_communication()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)
