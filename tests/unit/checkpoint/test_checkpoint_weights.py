"""Reading weights in a process that has no grid, as exports do."""

from pathlib import Path

import torch
import torch.distributed as dist

from skipmega.checkpoint.store import Checkpoint, CheckpointStore
from skipmega.config import RunConfig
from skipmega.parallel.grid import ParallelGrid, end_communication
from skipmega.parallel.logical import LogicalTensor


def test_weights_are_read_without_a_grid(grid: ParallelGrid, tmp_path: Path) -> None:
    """By their names in the model; optimizer moments are left out."""
    matrix, vector = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(4.0)
    saved = {
        "weights/embedding.weight": LogicalTensor(matrix, 0),
        "weights/layers.0.norm.weight": LogicalTensor(vector, None),
        "optimizer/exp_avg/embedding.weight": LogicalTensor(matrix.square(), 0),
    }
    path = CheckpointStore(tmp_path, keep=0).save(grid, RunConfig(), {"step": 3}, saved)
    end_communication()
    assert not dist.is_initialized()
    weights = Checkpoint.open(path).read_weights()
    assert weights.keys() == {"embedding.weight", "layers.0.norm.weight"}
    assert torch.equal(weights["embedding.weight"], matrix)
    assert torch.equal(weights["layers.0.norm.weight"], vector)
