"""A folder of checkpoints.

Each is a folder ``step-00000100`` with the tensors (torch distributed checkpoint, by logical name, so any
grid reads what any grid wrote), ``config.yaml``, ``state.json`` and, written last, ``manifest.json`` with
the size of every file. It is built under a temporary name and renamed when complete; what is not
complete is never read.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.futures import Future

from skipmega.config import RunConfig, dump_config, load_config
from skipmega.errors import CheckpointError
from skipmega.parallel.grid import ParallelGrid
from skipmega.parallel.logical import LogicalTensor

_MANIFEST, _STATE, _CONFIG, _TENSORS = "manifest.json", "state.json", "config.yaml", "tensors"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Check that ``path`` is a complete checkpoint, or a run folder or folder of checkpoints, whose
        newest one is taken.

        Raises:
            CheckpointError: nothing complete there; says what is missing.
        """
        path = Path(path)
        if (path / _MANIFEST).is_file():
            problem = _incompleteness(path)
            if problem:
                raise CheckpointError(f"checkpoint {path} is damaged: {problem}; use an earlier one")
            return cls(path)
        for folder in (path, path / "checkpoints"):
            if folder.is_dir():
                newest = CheckpointStore(folder, keep=0).latest()
                if newest is not None:
                    return newest
        raise CheckpointError(
            f"{path} holds no complete checkpoint: give a checkpoint folder (step-...), or a run folder"
        )

    @property
    def config(self) -> RunConfig:
        """The resolved configuration it was saved under."""
        return load_config(self.path / _CONFIG)

    @property
    def state(self) -> dict[str, Any]:
        """Counters and versions; ``step`` is the number of optimizer steps done."""
        loaded: dict[str, Any] = json.loads((self.path / _STATE).read_text())
        return loaded

    def read_into(self, tensors: Mapping[str, LogicalTensor], grid: ParallelGrid) -> None:
        """Fill ``tensors`` in place with this rank's parts; every process of the grid calls it together.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        mesh = _tensor_mesh(grid)
        target = {name: _distributed(tensor, mesh, grid) for name, tensor in tensors.items()}
        try:
            load_distributed(target, checkpoint_id=self.path / _TENSORS)
        except (CheckpointException, RuntimeError, ValueError, OSError) as error:
            raise CheckpointError(f"cannot read checkpoint {self.path}: {_cause(error)}") from error

    def read_weights(self) -> dict[str, Tensor]:
        """All weights as full float32 tensors by logical name, in this process alone (no grid needed)."""
        return self._read_alone("weights/")

    def read_routing(self) -> dict[str, Tensor]:
        """What routing remembers, as :meth:`skipmega.routing.state.RoutingState.tensors` names it; alone."""
        return self._read_alone("routing/")

    def _read_alone(self, prefix: str) -> dict[str, Tensor]:
        metadata = FileSystemReader(self.path / _TENSORS).read_metadata().state_dict_metadata
        target = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in metadata.items()
            if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant
            load_distributed(target, checkpoint_id=self.path / _TENSORS, no_dist=True)
        return {key.removeprefix(prefix): tensor for key, tensor in target.items()}


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: holds one folder a checkpoint.
        keep: newest checkpoints to keep; 0 keeps all.
    """

    def __init__(self, folder: str | Path, keep: int) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint; incomplete or damaged ones are passed over."""
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            if not path.name.endswith(".tmp") and not _incompleteness(path):
                return Checkpoint(path)
        return None

    def save(
        self,
        grid: ParallelGrid,
        config: RunConfig,
        state: dict[str, Any],
        tensors: Mapping[str, LogicalTensor],
    ) -> Path:
        """Write a checkpoint of step ``state["step"]``; every process of the grid calls it together.

        ``tensors`` holds the tensors of this stage; replicas (other data ranks, a tied embedding's second
        copy) may be left out or passed, they are written once. What killed saves left behind is removed
        once this one is complete.

        Raises:
            CheckpointError: it could not be written (no space left, say); nothing of it remains under the
                final name and earlier checkpoints are untouched. Raised on every process.
        """
        final = self.folder / f"step-{state['step']:08d}"
        building = final.with_name(final.name + ".tmp")
        _on_first_process(grid, final, lambda: _start_afresh(building))
        mesh = _tensor_mesh(grid)
        mine = tensors if grid.replicas.rank == 0 else {}
        needed = sum(tensor.local.numel() * tensor.local.element_size() for tensor in mine.values())
        try:
            save_distributed(
                {name: _distributed(tensor, mesh, grid) for name, tensor in mine.items()},
                storage_writer=_TensorWriter(building / _TENSORS),
            )
        except CheckpointException as error:
            free = shutil.disk_usage(self.folder).free
            cause = (
                f"{_cause(error)} (this process writes {needed / 1e6:.1f} MB, {free / 1e6:.0f} MB are free)"
            )
            _on_first_process(grid, final, lambda: shutil.rmtree(building, ignore_errors=True))
            raise CheckpointError(self._failure(final, cause)) from error
        _on_first_process(grid, final, lambda: self._complete(building, final, config, state))
        return final

    def _complete(self, building: Path, final: Path, config: RunConfig, state: dict[str, Any]) -> None:
        try:
            self._write_manifest(building, config, state)
        except OSError:
            shutil.rmtree(building, ignore_errors=True)
            raise
        if final.exists():
            shutil.rmtree(final)
        building.rename(final)
        _flush(self.folder)
        self._prune()

    def _write_manifest(self, building: Path, config: RunConfig, state: dict[str, Any]) -> None:
        (building / _CONFIG).write_text(dump_config(config))
        (building / _STATE).write_text(json.dumps(state, indent=2))
        files = {
            str(file.relative_to(building)): file.stat().st_size
            for file in sorted(building.rglob("*"))
            if file.is_file()
        }
        for name in files:
            _flush(building / name)
        (building / _MANIFEST).write_text(json.dumps({"files": files}, indent=2))
        _flush(building / _MANIFEST)

    def _prune(self) -> None:
        for left_over in self.folder.glob("step-*.tmp"):
            shutil.rmtree(left_over)
        complete = [path for path in sorted(self.folder.glob("step-*")) if not _incompleteness(path)]
        for path in complete[: -self.keep] if self.keep else []:
            shutil.rmtree(path)

    def _failure(self, final: Path, cause: str) -> str:
        last = self.latest()
        kept = f"the last good checkpoint is {last.path}" if last else "there is no earlier checkpoint"
        return f"could not save checkpoint {final}: {cause}; {kept}"


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


def _on_first_process(grid: ParallelGrid, final: Path, work: Callable[[], None]) -> None:
    """Run ``work`` on the first process; if it fails there, fail everywhere with the same words."""
    problem: list[str | None] = [None]
    if grid.rank == 0:
        try:
            work()
        except OSError as error:
            problem = [_cause(error)]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise CheckpointError(CheckpointStore(final.parent, keep=0)._failure(final, problem[0]))


def _start_afresh(building: Path) -> None:
    if building.exists():
        shutil.rmtree(building)
    building.mkdir(parents=True)


def _tensor_mesh(grid: ParallelGrid) -> DeviceMesh:
    return DeviceMesh.from_group(grid.tensor.group, "cpu")


def _distributed(tensor: LogicalTensor, mesh: DeviceMesh, grid: ParallelGrid) -> Tensor:
    if tensor.dim is None or grid.tensor.size == 1:
        return tensor.local
    return DTensor.from_local(tensor.local, mesh, [Shard(tensor.dim)], run_check=False)


def _incompleteness(path: Path) -> str | None:
    """What is wrong with the checkpoint at ``path``; None when it is complete."""
    files: dict[str, int] | None
    try:
        files = json.loads((path / _MANIFEST).read_text())["files"]
    except OSError:
        return f"{_MANIFEST} is missing (it was never finished)"
    except (ValueError, KeyError, TypeError):
        files = None
    if not isinstance(files, dict):
        return f"{_MANIFEST} is not readable"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: BaseException) -> str:
    """The first reason inside torch's bundle of per-process failures."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, failure = next(iter(error.failures.items()))
        reason = failure[0] if isinstance(failure, tuple) else failure
        return f"process {rank}: {_cause(reason)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f" ({error.filename})" if error.filename else "")
    return str(error)
