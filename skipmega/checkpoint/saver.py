"""Saving beside training: the state is copied at a step's end, files are written while training goes on."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from skipmega.checkpoint.store import CheckpointStore
from skipmega.config import RunConfig
from skipmega.errors import StorageFaultError
from skipmega.parallel.grid import ParallelGrid
from skipmega.parallel.logical import LogicalTensor

_FIRST_PAUSE = 1.0  # seconds before a failed save is tried again, doubled each time


class CheckpointSaver:
    """One save at a time, in a thread with a process group of its own.

    Whether a save failed is agreed among the processes inside that thread, so every process sees the same
    outcome; *when* it looks must be agreed by the caller. All methods that say so are collective.

    Args:
        store: where to.
        grid: this process's place; constructing is collective.
        config: the resolved configuration.
        attempt: number of this attempt at the run.
        check_fence: as :meth:`CheckpointStore.save` takes it.
    """

    def __init__(
        self,
        store: CheckpointStore,
        grid: ParallelGrid,
        config: RunConfig,
        attempt: int,
        check_fence: Callable[[], None],
    ) -> None:
        self._store, self._grid, self._config = store, grid, config
        self._attempt, self._check_fence = attempt, check_fence
        self._group = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.seconds = 0.0

    @property
    def writing(self) -> bool:
        """Whether a save that was begun is still being written; ``seconds`` is how long the last one was."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the save that was begun last has failed on this process; :meth:`wait` then raises it."""
        return self._failure is not None

    def begin(self, state: dict[str, Any], stage: Callable[[], Mapping[str, LogicalTensor]]) -> None:
        """Wait for the save before, copy the state and start to write it; collective.

        Args:
            state: counters and versions.
            stage: copies this process's share to host memory; it is not called before the memory that the
                save before wrote from is free.

        Raises:
            StorageFaultError, RunFencedError: of the save before.
        """
        self.wait()
        tensors = stage()
        self._thread = threading.Thread(
            target=self._run, args=(state, tensors), name="checkpoint writer", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last save is complete; collective.

        Raises:
            StorageFaultError, RunFencedError: it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, state: dict[str, Any], tensors: Mapping[str, LogicalTensor]) -> None:
        begun = time.perf_counter()
        try:
            self._save(state, tensors)
        except BaseException as error:
            self._failure = error
        self.seconds = time.perf_counter() - begun

    def _save(self, state: dict[str, Any], tensors: Mapping[str, LogicalTensor]) -> None:
        for retry in range(self._config.checkpoint.retries + 1):
            try:
                self._store.save(
                    self._grid, self._config, state, tensors, self._group, self._attempt, self._check_fence
                )
                return
            except StorageFaultError:
                if retry == self._config.checkpoint.retries:
                    raise
            time.sleep(_FIRST_PAUSE * 2**retry)
