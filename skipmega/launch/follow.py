"""Evaluating each checkpoint of a run as it appears, beside the training job."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from skipmega.checkpoint.store import Checkpoint, CheckpointStore
from skipmega.config import load_config
from skipmega.errors import ConfigError
from skipmega.evaluation import EvaluationResult
from skipmega.parallel.grid import ParallelGrid

RESULTS = "evaluations"


def follow_checkpoints(
    run_dir: str | Path,
    evaluate: Callable[[Checkpoint], EvaluationResult],
    grid: ParallelGrid,
    seconds: float = 30.0,
) -> Iterator[EvaluationResult]:
    """Evaluate every checkpoint of a run, oldest first, until that of its last step.

    What was found is written to ``evaluations/CHECKPOINT.json`` in the run folder, and not evaluated again by
    a later job. All processes of ``grid`` call it together.

    Args:
        run_dir: a run folder that training has begun to write.
        evaluate: the evaluation of one checkpoint.
        grid: where it runs.
        seconds: between two looks for new checkpoints.

    Yields:
        Each result, on every process.

    Raises:
        ConfigError: ``run_dir`` is not a run folder.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir} has no config.yaml: give the folder of a run to follow")
    while True:
        found, is_over = _broadcast(_next_checkpoint(run_dir) if grid.rank == 0 else None)
        if found is not None:
            result = evaluate(Checkpoint.open(found))
            path = _result_of(run_dir, found)
            if grid.rank == 0:
                path.parent.mkdir(exist_ok=True)
                result.write_json(path)
            dist.barrier()
            yield result
        elif is_over:
            return
        else:
            time.sleep(seconds)


def _next_checkpoint(run_dir: Path) -> tuple[Path | None, bool]:
    """The oldest checkpoint without a result, and whether the run will write no more."""
    store = CheckpointStore(run_dir / "checkpoints", keep=0)
    checkpoints = [checkpoint.path for checkpoint in reversed(store.all_newest_first())]
    waiting = [path for path in checkpoints if not _result_of(run_dir, path).is_file()]
    if waiting:
        return waiting[0], False
    last = load_config(run_dir / "config.yaml").training.steps
    return None, bool(checkpoints) and Checkpoint(checkpoints[-1]).state["step"] >= last


def _result_of(run_dir: Path, checkpoint: Path) -> Path:
    return run_dir / RESULTS / f"{checkpoint.name}.json"


def _broadcast(value: tuple[Path | None, bool] | None) -> tuple[Path | None, bool]:
    told = [value]
    dist.broadcast_object_list(told, src=0)
    assert told[0] is not None
    return told[0]
