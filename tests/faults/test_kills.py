"""Processes that are killed at random: the run ends with the bits it would have ended with."""

import random
import time
from itertools import count

import pytest

from support.tiny_run import STEPS

GRIDS = {
    "TP2": ("parallel.tensor_parallel=2", "parallel.sequence_parallel=true"),
    "PP2": ("parallel.pipeline_parallel=2", "parallel.chunks_per_stage=2"),
    "zero3": ("parallel.zero_stage=3",),
}
VICTIMS = [(), (0,), (1,)]  # all, or one of them


def is_saving(checkpoints, wanted):
    """Whether step ``wanted`` or a later one is being written."""
    return any(int(path.name[5:13]) >= wanted for path in checkpoints.glob("step-*.tmp"))


def kill_at_random(disturbed, name, chance, tally):
    """One attempt, killed at a random moment of the time a whole one takes, or inside a save; False if it had
    ended by then."""
    attempt = disturbed.attempt(name)
    checkpoints = disturbed.folder / name / "checkpoints"
    victims = chance.choice(VICTIMS)
    if chance.random() < 0.4:
        wanted = chance.randrange(1, STEPS + 1)
        lives = attempt.until(lambda: is_saving(checkpoints, wanted))
        time.sleep(chance.uniform(0, 0.02))
    else:
        end = time.monotonic() + chance.uniform(0.1, 4.0)
        lives = attempt.until(lambda: time.monotonic() > end)
    if not lives:
        assert attempt.join() == [0, 0], disturbed.said(name)
        return False
    unfinished = any(checkpoints.glob("step-*.tmp"))
    attempt.kill(*victims)
    tally["inside a save" if unfinished else "elsewhere"] += 1
    return True


def kill_many(disturbed, kills):
    """Until there have been so many; every run ends as if there had been none."""
    chance, tally = random.Random(kills), {"inside a save": 0, "elsewhere": 0}
    runs = count()
    while sum(tally.values()) < kills:
        name = f"killed-{kills}-{next(runs)}"
        while sum(tally.values()) < kills and kill_at_random(disturbed, name, chance, tally):
            pass
        disturbed.finish(name)
    print(f"{tally} in {next(runs)} runs")


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kills", [5, pytest.param(110, marks=pytest.mark.faults)])
def test_killed_processes(disturbed, kills):
    kill_many(disturbed, kills)


@pytest.mark.faults
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("grid", GRIDS)
def test_killed_processes_of_other_grids(disturbed, grid):
    kill_many(disturbed.on(grid, *GRIDS[grid]), 8)
