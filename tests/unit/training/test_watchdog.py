"""Who holds the others up."""

from dataclasses import replace

import pytest

from skipmega.training.watchdog import Heartbeat, accuse, laggards

WAITING = '  File "/x/torch/distributed/distributed_c10d.py", line 1, in all_reduce\n'
BUSY = '  File "/x/skipmega/data/order/batches.py", line 1, in __getitem__\n'


def beat(rank: int, count: int, stack: str) -> Heartbeat:
    return Heartbeat(rank, count, step=count // 4, phase="update", seconds=60.0, stack=stack)


@pytest.mark.parametrize(
    ("beats", "expected"),
    [
        ([beat(0, 9, WAITING), beat(1, 8, BUSY), beat(2, 9, WAITING)], [1]),
        ([beat(0, 9, WAITING), beat(1, 8, WAITING)], [1]),
        ([beat(0, 9, WAITING), beat(1, 9, BUSY), beat(2, 9, WAITING)], [1]),
        ([beat(0, 9, WAITING), beat(1, 9, WAITING)], [0, 1]),
        ([beat(0, 9, BUSY), Heartbeat(1, -1, 0, "never heard of")], [1]),
    ],
)
def test_those_that_did_least_and_do_not_wait(beats: list[Heartbeat], expected: list[int]) -> None:
    assert [one.rank for one in laggards(beats)] == expected


def test_the_accusation_names_rank_step_phase_and_stack() -> None:
    beats = [beat(0, 9, WAITING), beat(1, 8, BUSY), beat(2, 10, WAITING)]
    assert accuse(beats, 60.0).splitlines() == [
        "hung: no progress for 60 s; held up by",
        "rank 1 in step 2, update, for 60 s",
        BUSY.strip("\n"),
        "2 other ranks wait, the furthest is rank 2 in step 2, update, for 60 s",
    ]
    silent = replace(beats[1], seconds=None, stack="")
    assert "rank 1, last heard of in step 2, update" in accuse([beats[0], silent], 60.0)
