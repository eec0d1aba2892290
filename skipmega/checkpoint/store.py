"""A folder of checkpoints.

Each is a folder ``step-00000100`` with the tensors (torch distributed checkpoint, by logical name, so any
grid reads what any grid wrote), ``config.yaml``, ``state.json`` and, written last, ``manifest.json`` with
the size and the SHA-256 of every file. It is built under a temporary name, flushed to disk and renamed when
complete; what is not complete is never read.
"""

import json
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
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from skipmega.checkpoint import manifest
from skipmega.checkpoint.tensors import distribute, first_cause, write_tensors, written_by
from skipmega.config import RunConfig, dump_config, load_config
from skipmega.errors import CheckpointDamagedError, CheckpointError, RunFencedError, StorageFaultError
from skipmega.parallel.grid import ParallelGrid
from skipmega.parallel.logical import LogicalTensor

_STATE, _CONFIG, _TENSORS = "state.json", "config.yaml", "tensors"
_SPARE_BYTES = 16 * 2**20  # beside the tensors: their metadata, the configuration, the file system's own


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Check that ``path`` is a complete checkpoint, or a run folder or folder of checkpoints, whose
        newest one is taken. What the files contain is checked when they are read.

        Raises:
            CheckpointError: nothing complete there; says what is missing.
        """
        path = Path(path)
        if (path / manifest.NAME).is_file():
            problem = manifest.incompleteness(path)
            if problem:
                raise _damaged(path, problem)
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
            CheckpointDamagedError: a file is missing or not what was written; nothing was filled.
            CheckpointError: a tensor is missing or has another shape.
        """
        problems: list[str | None] = [None] * grid.world_size
        dist.all_gather_object(problems, manifest.damage(self.path, grid.rank, grid.world_size))
        for problem in filter(None, problems):
            raise _damaged(self.path, problem)
        try:
            load_distributed(dict(distribute(tensors, grid)), checkpoint_id=self.path / _TENSORS)
        except (CheckpointException, RuntimeError, ValueError, OSError) as error:
            raise CheckpointError(f"cannot read checkpoint {self.path}: {first_cause(error)}") from error

    def read_weights(self) -> dict[str, Tensor]:
        """All weights as full float32 tensors by logical name, in this process alone (no grid needed)."""
        return self.read_alone("weights/")

    def read_routing(self) -> dict[str, Tensor]:
        """What routing remembers, as :meth:`skipmega.routing.state.RoutingState.tensors` names it; alone."""
        return self.read_alone("routing/")

    def read_alone(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose names begin with ``prefix``, whole, by the rest of their names; no grid needed.

        Raises:
            CheckpointDamagedError: a file is missing or not what was written.
        """
        problem = manifest.damage(self.path)
        if problem is not None:
            raise _damaged(self.path, problem)
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
        keep_every: also keep those of every so many steps; 0 keeps none for that.
    """

    def __init__(self, folder: str | Path, keep: int, keep_every: int = 0) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self.keep_every = keep_every

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint; incomplete ones are passed over."""
        complete = (entry for entry in self.all_newest_first() if not manifest.incompleteness(entry.path))
        return next(complete, None)

    def all_newest_first(self) -> list[Checkpoint]:
        """Every checkpoint that was once complete, whatever has become of it since."""
        paths = (path for path in self.folder.glob("step-*") if path.is_dir() and path.suffix != ".tmp")
        return [Checkpoint(path) for path in sorted(paths, reverse=True)]

    def save(
        self,
        grid: ParallelGrid,
        config: RunConfig,
        state: dict[str, Any],
        tensors: Mapping[str, LogicalTensor],
        group: dist.ProcessGroup | None = None,
        attempt: int = 0,
        check_fence: Callable[[], None] = lambda: None,
    ) -> Path:
        """Write a checkpoint of step ``state["step"]``; every process of the grid calls it together.

        Args:
            grid: this process's place.
            config: the resolved configuration.
            state: counters and versions.
            tensors: those that this process writes. Replicas (other data ranks, a tied embedding's second
                copy) may be left out or passed, they are written once.
            group: all processes, for collectives of its own; left out, the world.
            attempt: number of the attempt at the run, part of the temporary name.
            check_fence: raises :class:`RunFencedError` on the first process once a newer attempt owns the
                run. A newer attempt moves the temporary folder away before it looks for checkpoints: what
                it has not seen cannot get its final name any more.

        Raises:
            StorageFaultError: it could not be written (no space left, say); nothing of it remains under the
                final name and earlier checkpoints are untouched. Raised on every process.
            RunFencedError: the same on every process; nothing was written.
        """
        final = self.folder / f"step-{state['step']:08d}"
        building = final.with_name(f"{final.name}.{attempt}.tmp")
        mine = sum(tensor.local.numel() * tensor.local.element_size() for tensor in tensors.values())
        needed = sum(_gather(mine, grid, group))

        def start() -> None:
            check_fence()
            _start_afresh(building)
            free = shutil.disk_usage(building).free
            if free < needed + _SPARE_BYTES:
                shutil.rmtree(building)
                raise OSError(f"it needs {needed / 1e6:.1f} MB, {free / 1e6:.0f} MB are free")

        def complete() -> None:
            try:
                files = {name: entry for part in parts for name, entry in part.items()}
                (building / _CONFIG).write_text(dump_config(config))
                (building / _STATE).write_text(json.dumps(state, indent=2))
                files |= {name: manifest.describe_file(building / name) for name in (_CONFIG, _STATE)}
                manifest.write_manifest(building, files)
                check_fence()
                self._put_in_place(building, final)
            except (OSError, RunFencedError):
                shutil.rmtree(building, ignore_errors=True)
                raise
            self.remove_unfinished(attempt)
            self._prune()

        def on_first_process(work: Callable[[], None]) -> None:
            self._on_first_process(work, final, group, check_fence)

        def give_up() -> None:
            shutil.rmtree(building, ignore_errors=True)
            check_fence()

        on_first_process(start)
        try:
            write_tensors(building / _TENSORS, tensors, grid, group)
            parts = self._describe_tensors(building, grid, group)
        except (CheckpointException, OSError) as error:
            free = shutil.disk_usage(self.folder).free
            cause = f"{first_cause(error)} ({needed / 1e6:.1f} MB to write, {free / 1e6:.0f} MB free)"
            on_first_process(give_up)
            raise StorageFaultError(self._failure(final, cause)) from error
        on_first_process(complete)
        return final

    def remove_unfinished(self, attempt: int) -> None:
        """Remove what saves of ``attempt`` and of earlier ones left behind, or are still writing."""
        for left_over in self.folder.glob("step-*.tmp"):
            number = left_over.name.split(".")[1]
            if not number.isdigit() or int(number) <= attempt:
                doomed = left_over.with_name(f".removed-{left_over.name}")
                shutil.rmtree(doomed, ignore_errors=True)
                left_over.rename(doomed)  # at once, whoever still writes into it
                shutil.rmtree(doomed, ignore_errors=True)

    def _describe_tensors(
        self, building: Path, grid: ParallelGrid, group: dist.ProcessGroup | None
    ) -> list[dict[str, Any]]:
        """By process: the files it wrote, with size and checksum.

        Raises:
            OSError: one process cannot read what it wrote; the same on every process.
        """
        mine: dict[str, Any] | str
        try:
            files = written_by(grid.rank, building / _TENSORS)
            mine = {str(file.relative_to(building)): manifest.describe_file(file) for file in files}
        except OSError as error:
            mine = f"process {grid.rank}: {first_cause(error)}"
        parts = _gather(mine, grid, group)
        for problem in (part for part in parts if isinstance(part, str)):
            raise OSError(problem)
        return parts

    def _put_in_place(self, building: Path, final: Path) -> None:
        if final.exists():
            shutil.rmtree(final.with_name(f"{final.name}.tmp"), ignore_errors=True)
            final.rename(final.with_name(f"{final.name}.tmp"))
        building.rename(final)
        manifest.flush_folder(self.folder)

    def _prune(self) -> None:
        complete = [
            entry.path for entry in self.all_newest_first() if not manifest.incompleteness(entry.path)
        ]
        for path in complete[self.keep :] if self.keep else []:
            step = int(path.name.removeprefix("step-"))
            if self.keep_every == 0 or step % self.keep_every:
                shutil.rmtree(path)

    def _on_first_process(
        self,
        work: Callable[[], None],
        final: Path,
        group: dist.ProcessGroup | None,
        check_fence: Callable[[], None],
    ) -> None:
        """Run ``work`` on the first process; if it fails there, fail everywhere with the same words.

        What failed because a newer attempt took the files away is no fault of the storage.
        """
        outcome: list[tuple[type[Exception], str] | None] = [None]
        if dist.get_rank() == 0:
            try:
                try:
                    work()
                except OSError as error:
                    check_fence()
                    outcome = [(StorageFaultError, self._failure(final, first_cause(error)))]
            except RunFencedError as error:
                outcome = [(RunFencedError, str(error))]
        dist.broadcast_object_list(outcome, src=0, group=group)
        if outcome[0] is not None:
            kind, message = outcome[0]
            raise kind(message)

    def _failure(self, final: Path, cause: str) -> str:
        last = self.latest()
        kept = f"the last good checkpoint is {last.path}" if last else "there is no earlier checkpoint"
        return f"could not save checkpoint {final}: {cause}; {kept}"


def _gather(value: Any, grid: ParallelGrid, group: dist.ProcessGroup | None) -> list[Any]:
    values: list[Any] = [None] * grid.world_size
    dist.all_gather_object(values, value, group=group)
    return values


def _start_afresh(building: Path) -> None:
    if building.exists():
        shutil.rmtree(building)
    building.mkdir(parents=True)


def _damaged(path: Path, problem: str) -> CheckpointDamagedError:
    return CheckpointDamagedError(f"checkpoint {path} is damaged: {problem}; use an earlier one")
