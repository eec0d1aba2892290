"""Who sends how many rows to whom."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipmega.routing.dispatch import plan_balance

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@given(COUNTS)
def test_every_rank_runs_the_mean(counts: list[int]) -> None:
    plan = plan_balance(counts)
    assert sum(plan.targets) == sum(counts)
    assert max(plan.targets) - min(plan.targets) <= 1
    for rank, (count, target) in enumerate(zip(counts, plan.targets, strict=True)):
        sent, received = plan.sent(rank), plan.received(rank)
        assert count - sum(sent) + sum(received) == target
        assert not sum(sent) or not sum(received), "nobody does both"


@given(COUNTS)
def test_no_balance_moves_fewer_rows(counts: list[int]) -> None:
    floor, left = divmod(sum(counts), len(counts))
    fewest = min(
        sum(max(0, count - floor - (rank in rounded_up)) for rank, count in enumerate(counts))
        for rounded_up in combinations(range(len(counts)), left)
    )
    assert plan_balance(counts).moved == fewest


@pytest.mark.parametrize(
    ("counts", "targets", "moves"),
    [
        ([0, 7], [3, 4], [[0, 0], [3, 0]]),
        ([5, 0, 0, 0], [2, 1, 1, 1], [[0, 1, 1, 1], [0] * 4, [0] * 4, [0] * 4]),
        ([6, 6, 0, 0], [3, 3, 3, 3], [[0, 0, 3, 0], [0, 0, 0, 3], [0] * 4, [0] * 4]),
        ([2, 3], [2, 3], [[0, 0], [0, 0]]),
    ],
)
def test_examples(counts: list[int], targets: list[int], moves: list[list[int]]) -> None:
    plan = plan_balance(counts)
    assert list(plan.targets) == targets
    assert [list(row) for row in plan.moves] == moves
    assert plan.moved == sum(map(sum, moves))
