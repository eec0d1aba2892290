"""What checkpoints cost: seconds to save and to load, bytes, and what training loses meanwhile."""

import json
import statistics
from pathlib import Path
from typing import Any

import torch.distributed as dist

from skipmega.checkpoint.manifest import NAME as MANIFEST
from skipmega.config import RunConfig, resolve_grid, resolve_vocabulary
from skipmega.experiments.step_times import now, random_batches, slowest
from skipmega.launch.run import RunSaver, claim, resume, versions
from skipmega.launch.run_folder import RunFolder
from skipmega.parallel.grid import ParallelGrid
from skipmega.training.engine import TrainingEngine
from skipmega.training.loop import Progress
from skipmega.training.sums import StepSums

_COLUMNS = {
    "checkpoint_gb": "checkpoint, GB",
    "median_step": "step without a save, s",
    "longest_quiet_step": "longest of those, s",
    "copied": "copy, s",
    "saved": "saved after, s",
    "steps_meanwhile": "steps meanwhile",
    "longest_meanwhile": "longest of those, s",
    "stall": "lost to training, s",
    "loaded": "load, s",
}


def measure_saves(
    config: RunConfig, grid: ParallelGrid, quiet_steps: int, saves: int, most_steps: int
) -> dict[str, Any]:
    """Train on random tokens in the empty folder ``run_dir``, first without saving, then with a few saves,
    and load the last one; all processes call it together.

    A save is begun at the end of a step, as in a run, and the steps that begin while it is written, at most
    ``most_steps``, are compared with the median of those without: ``stall`` is their extra time and that of
    the copy. Loading includes the comparison of checksums; the files are then still in the host's memory.

    Returns:
        Times in seconds, of the slowest process where there are several; one entry a save where it is a list.
    """
    config = resolve_grid(resolve_vocabulary(config, None), grid.world_size)
    folder, batches = RunFolder(config), random_batches(config, grid)
    engine = TrainingEngine(config, grid)
    saver = RunSaver(engine, folder, claim(folder, grid))
    progress, sums = Progress(), StepSums.zeros(config, grid)

    def train() -> float:
        begun = now(grid.device)
        engine.train_step(batches, progress.step, config.optimizer.learning_rate, sums)
        progress.step += 1
        return slowest(now(grid.device) - begun, grid)

    for _ in range(3):  # compilation
        train()
    quiet = [train() for _ in range(quiet_steps)]
    median = statistics.median(quiet)
    copied, saved, stalls, during = [], [], [], []
    for _ in range(saves):
        begun = now(grid.device)
        saver.begin(progress)
        copied.append(slowest(now(grid.device) - begun, grid))
        meanwhile: list[float] = []
        while slowest(float(saver.files.writing), grid) and len(meanwhile) < most_steps:
            meanwhile.append(train())
        saver.wait()
        saved.append(slowest(saver.files.seconds, grid) + copied[-1])
        stalls.append(copied[-1] + sum(meanwhile) - median * len(meanwhile))
        during.append(meanwhile)
    begun = now(grid.device)
    _, path = resume(engine, grid, folder)
    loaded = slowest(now(grid.device) - begun, grid)
    dist.barrier()
    assert path is not None
    return {
        "grid": grid.describe(),
        "zero_stage": config.parallel.zero_stage,
        "checkpoint_gb": checkpoint_bytes(path) / 1e9,
        "median_step": median,
        "longest_quiet_step": max(quiet),
        "copied": copied,
        "saved": saved,
        "steps_meanwhile": [len(steps) for steps in during],
        "longest_meanwhile": [max(steps, default=0.0) for steps in during],
        "stall": stalls,
        "loaded": loaded,
        "versions": versions(),
    }


def checkpoint_bytes(path: Path) -> int:
    """Size of the files that a checkpoint's manifest names."""
    files = json.loads((path / MANIFEST).read_text())["files"]
    return sum(int(entry["size"]) for entry in files.values())


def table(record: dict[str, Any]) -> str:
    """:func:`measure_saves`'s record in Markdown, one line a number."""

    def shown(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(shown, value))
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    rows = [f"| {words} | {shown(record[name])} |" for name, words in _COLUMNS.items()]
    return "\n".join([f"| {record['grid']}, ZeRO {record['zero_stage']} | |", "|---|---|", *rows])
