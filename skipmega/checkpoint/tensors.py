"""The tensors of a checkpoint: torch distributed checkpoint by logical name."""

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.futures import Future

from skipmega.parallel.grid import ParallelGrid
from skipmega.parallel.logical import LogicalTensor


def distribute(tensors: Mapping[str, LogicalTensor], grid: ParallelGrid) -> dict[str, Tensor]:
    """The same tensors as parts of whole ones, cut over the tensor axis."""
    mesh = DeviceMesh.from_group(grid.tensor.group, "cpu")
    cut = grid.tensor.size > 1
    return {
        name: DTensor.from_local(tensor.local, mesh, [Shard(tensor.dim)], run_check=False)
        if cut and tensor.dim is not None
        else tensor.local
        for name, tensor in tensors.items()
    }


def write_tensors(
    folder: Path, tensors: Mapping[str, LogicalTensor], grid: ParallelGrid, group: dist.ProcessGroup | None
) -> None:
    """Write and flush; every process of ``group`` calls it together. What several pass is written once.

    Raises:
        CheckpointException: some process could not write; raised on every one.
    """
    save_distributed(distribute(tensors, grid), storage_writer=_TensorWriter(folder), process_group=group)


def written_by(rank: int, folder: Path) -> list[Path]:
    """The files that :func:`write_tensors` made on process ``rank``; the first also wrote the metadata."""
    files = sorted(folder.glob(f"__{rank}_*.distcp"))
    return [*files, folder / ".metadata"] if rank == 0 else files


def first_cause(error: BaseException) -> str:
    """The first reason inside torch's bundle of per-process failures."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, failure = next(iter(error.failures.items()))
        reason = failure[0] if isinstance(failure, tuple) else failure
        return f"process {rank}: {first_cause(reason)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f" ({error.filename})" if error.filename else "")
    return str(error)


class _TensorWriter(FileSystemWriter):
    """torch's writer, but a failed write is the operating system's error and not one of its consequences."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # torch.save cannot finish its archive once a write has failed
            failed_write = error.__context__
            if isinstance(failed_write, OSError):
                raise failed_write from None
            raise
