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


@given(COUNTS)
def test_rows_that_move_are_surplus_and_leave_their_rank(counts: list[int]) -> None:
    plan = plan_balance(counts)
    assert plan.moved == sum(
        max(0, count - target) for count, target in zip(counts, plan.targets, strict=True)
    )
    for rank, row in enumerate(plan.moves):
        assert min(row) >= 0
        assert row[rank] == 0


@given(COUNTS)
def test_no_rank_that_brings_more_runs_less(counts: list[int]) -> None:
    targets = [target for _, target in sorted(zip(counts, plan_balance(counts).targets, strict=True))]
    assert targets == sorted(targets)


@given(COUNTS)
def test_every_rank_makes_the_same_plan(counts: list[int]) -> None:
    assert plan_balance(counts) == plan_balance(tuple(counts))
    assert plan_balance(plan_balance(counts).targets).moved == 0, "a balance is left alone"


@pytest.mark.parametrize(
    ("counts", "targets", "moves"),
    [
        ([0, 7], [3, 4], [[0, 0], [3, 0]]),
        ([5, 0, 0, 0], [2, 1, 1, 1], [[0, 1, 1, 1], [0] * 4, [0] * 4, [0] * 4]),
        ([6, 6, 0, 0], [3, 3, 3, 3], [[0, 0, 3, 0], [0, 0, 0, 3], [0] * 4, [0] * 4]),
        ([2, 3], [2, 3], [[0, 0], [0, 0]]),
        ([0, 0], [0, 0], [[0, 0], [0, 0]]),
        ([9], [9], [[0]]),
    ],
)
def test_examples(counts: list[int], targets: list[int], moves: list[list[int]]) -> None:
    plan = plan_balance(counts)
    assert list(plan.targets) == targets
    assert [list(row) for row in plan.moves] == moves
    assert plan.moved == sum(map(sum, moves))
