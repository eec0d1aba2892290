"""Stands in for pretrain.py where it matters what SLURM and the batch script do: the same exit codes,
signals, stop file, fence and checkpoints, without torch. A step is a tenth of a second and a hash of the one
before.

``plan.json`` in the run folder: ``steps``, ``interval`` of checkpoints, and ``exits``: by attempt the step
after which the last task leaves, and its code. An attempt that is not named goes on to the end. In its place
the variable ``PLANS`` may hold one for all runs, or one for each by the name of its folder.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import yaml

DONE, REQUEUE, FENCED = 0, 75, 76
attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
run = Path(yaml.safe_load(Path(sys.argv[1]).read_text())["run_dir"])
plan = json.loads((run / "plan.json").read_text() if "PLANS" not in os.environ else os.environ["PLANS"])
plan = plan.get(run.name, plan)
asked: list[int] = []


def main() -> int:
    """Train, as far as the plan and the cluster let it; returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: asked.append(number))
    step, state = newest()
    if rank == 0:
        (run / "owner").write_text(str(attempt))
        shutil.copy(sys.argv[1], run / "config.yaml")
    leave_at, code = plan["exits"].get(str(attempt), (None, DONE))
    while step < plan["steps"]:
        if step == leave_at:
            if rank == world - 1:
                while len(list(run.glob(f"waits-{attempt}-*"))) < world - 1:
                    time.sleep(0.02)
                return int(code)
            (run / f"waits-{attempt}-{rank}").touch()
            time.sleep(60)  # for the one that has left, as in a collective
            return 1
        time.sleep(0.1)
        step, state = step + 1, hashlib.sha256(f"{state} {step}".encode()).hexdigest()
        stop = asked or (run / "stop").exists()
        if rank == 0 and (stop or step % plan["interval"] == 0 or step == plan["steps"]):
            if (run / "owner").read_text() != str(attempt):
                return FENCED
            save(step, state)
        if stop:
            if rank == 0:
                time.sleep(
                    0.5
                )  # the other tasks of a stand-in do not agree on the step: they look for themselves
                (run / "stop").unlink(missing_ok=True)
            return REQUEUE
    return DONE


def newest() -> tuple[int, str]:
    saved = sorted((run / "checkpoints").glob("step-????????"))
    return (int(saved[-1].name[5:]), (saved[-1] / "state").read_text()) if saved else (0, "")


def save(step: int, state: str) -> None:
    final = run / "checkpoints" / f"step-{step:08d}"
    building = final.with_name(final.name + ".tmp")
    building.mkdir(parents=True, exist_ok=True)
    (building / "state").write_text(state)
    if not final.exists():
        building.rename(final)
    with (run / "saves").open("a") as stream:
        stream.write(f"{attempt} {step}\n")


code = main()
if code:
    # the last of its exits that a launcher cannot hide
    (Path(os.environ["SKIPMEGA_EXIT_DIR"]) / str(code)).touch()
sys.exit(code)
