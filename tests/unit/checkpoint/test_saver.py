"""Saving beside training: what a thread does, and when the caller hears of it."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from skipmega.checkpoint import saver
from skipmega.checkpoint.saver import CheckpointSaver
from skipmega.checkpoint.store import Checkpoint, CheckpointStore
from skipmega.config import build_config
from skipmega.errors import StorageFaultError
from skipmega.parallel.grid import ParallelGrid
from skipmega.parallel.logical import LogicalTensor


def make(
    grid: ParallelGrid, folder: Path, failures: int = 0, retries: int = 0
) -> tuple[CheckpointSaver, mock.Mock]:
    """A saver whose store fails so often before it works, and the store's ``save``."""
    store = CheckpointStore(folder, keep=0)
    config = build_config({"checkpoint": {"retries": retries}, "model": {"vocab_size": 128}}, source="test")
    outcomes = [StorageFaultError("full")] * failures + [mock.DEFAULT] * 9
    save = mock.Mock(wraps=store.save, side_effect=outcomes)
    mock.patch.object(store, "save", save).start()
    return CheckpointSaver(store, grid, config, attempt=1, check_fence=lambda: None), save


def test_what_was_staged_is_written_and_no_memory_is_taken_while_it_is(
    grid: ParallelGrid, tmp_path: Path
) -> None:
    made, _ = make(grid, tmp_path)
    buffer = torch.zeros(1000)
    for step in (1, 2, 3):
        # the buffer is written over: the save before must have read it
        made.begin({"step": step}, lambda step=step: {"w": LogicalTensor(buffer.fill_(step), None)})
    made.wait()
    for step in (1, 2, 3):
        (found,) = Checkpoint(tmp_path / f"step-{step:08d}").read_alone("").values()
        assert torch.equal(found, torch.full((1000,), float(step)))


@pytest.mark.parametrize("failures", [0, 2])
def test_a_failing_save_is_tried_again(grid: ParallelGrid, tmp_path: Path, failures: int) -> None:
    made, save = make(grid, tmp_path, failures, retries=2)
    with mock.patch.object(saver, "_FIRST_PAUSE", 0.0):
        made.begin({"step": 1}, lambda: {"w": LogicalTensor(torch.ones(3), None)})
        made.wait()
    assert save.call_count == failures + 1
    assert not made.failed


def test_a_failure_is_told_once_by_whoever_waits_next(grid: ParallelGrid, tmp_path: Path) -> None:
    made, _ = make(grid, tmp_path, failures=1)
    made.begin({"step": 1}, lambda: {})
    with pytest.raises(StorageFaultError, match="full"):
        made.begin({"step": 2}, lambda: pytest.fail("nothing is staged before the failure is told"))
    made.begin({"step": 3}, lambda: {"w": LogicalTensor(torch.ones(3), None)})
    made.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
