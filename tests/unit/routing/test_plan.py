"""The packing plan against a plain loop, and the promises that routing rests on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipmega.routing.plan import PackingPlan, group_capacity, make_plan, slots_before


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Decisions [s, b], a group size that divides s, and a capacity, sometimes larger than the group."""
    group_size, groups = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    batch = draw(st.integers(1, 3))
    share = draw(st.sampled_from([0, 1, 5, 9, 10]))
    count = group_size * groups * batch
    bits = draw(st.lists(st.integers(0, 9).map(lambda x: x < share), min_size=count, max_size=count))
    return torch.tensor(bits).view(-1, batch), group_size, draw(st.integers(1, group_size + 1))


def expected_slots(execute: Tensor, group_size: int, capacity: int) -> list[list[int | None]]:
    """Slot of each token within its sequence, [s][b], by walking the sequence; None is skipped."""
    length, batch = execute.shape
    slots: list[list[int | None]] = [[None] * batch for _ in range(length)]
    for sequence in range(batch):
        for group in range(length // group_size):
            taken = 0
            for position in range(group * group_size, (group + 1) * group_size):
                if execute[position, sequence] and taken < capacity:
                    slots[position][sequence] = group * capacity + taken
                    taken += 1
    return slots


def check_against_the_walk(plan: PackingPlan, execute: Tensor, group_size: int, capacity: int) -> None:
    length, batch = execute.shape
    walked = expected_slots(execute, group_size, capacity)
    flat = [-1 if slot is None else slot * batch + b for row in walked for b, slot in enumerate(row)]
    assert plan.slots.tolist() == flat
    owner = {slot: row for row, slot in enumerate(flat) if slot >= 0}
    for slot in range(length // group_size * capacity * batch):
        sequence, group = slot % batch, slot // batch // capacity
        padding = ((group + 1) * group_size - 1) * batch + sequence
        assert plan.rows[slot] == owner.get(slot, padding)


@settings(deadline=None)
@given(cases())
def test_the_plan_is_what_walking_each_group_gives(case: tuple[Tensor, int, int]) -> None:
    check_against_the_walk(make_plan(*case), *case)


@settings(deadline=None)
@given(cases())
def test_slots_are_unique_ordered_and_within_capacity(case: tuple[Tensor, int, int]) -> None:
    execute, group_size, capacity = case
    length, batch = execute.shape
    plan = make_plan(*case)
    used = plan.slots[plan.slots >= 0]
    assert len(used.unique()) == len(used)
    assert torch.equal(plan.rows[used], (plan.slots >= 0).nonzero().squeeze(1)), "rows and slots are inverse"
    assert torch.equal(plan.kept, (plan.slots >= 0).view(length, batch))
    assert not (plan.kept & ~execute).any()
    assert (plan.kept.view(-1, group_size, batch).sum(1) <= capacity).all()
    assert plan.positions.shape == (length // group_size * capacity, batch)
    assert (plan.positions.diff(dim=0) >= 0).all(), "ascending, padding included"
    assert torch.equal(plan.positions, plan.rows.view(-1, batch) // batch)
    assert torch.equal(plan.rows.view(-1, batch) % batch, torch.arange(batch).expand_as(plan.positions))


@settings(deadline=None)
@given(cases())
def test_every_group_drops_its_overflow_and_pads_the_rest(case: tuple[Tensor, int, int]) -> None:
    """Slots of a group: as many as its capacity, each a token's or padding."""
    execute, group_size, capacity = case
    batch = execute.shape[1]
    plan = make_plan(*case)
    asked = execute.view(-1, group_size, batch).sum(1)
    kept = plan.kept.view(-1, group_size, batch).sum(1)
    assert torch.equal(kept, asked.clamp(max=capacity))
    owner = plan.slots[plan.rows]
    padding = (owner != torch.arange(len(plan.rows))).view(-1, capacity, batch).sum(1)
    assert torch.equal(padding, capacity - kept)


@settings(deadline=None)
@given(cases(), st.booleans())
def test_slots_before_a_token_are_those_of_earlier_tokens(
    case: tuple[Tensor, int, int], dropless: bool
) -> None:
    """Of a whole sequence that is the number of a kept token's own slot."""
    execute, _, capacity = case
    length, batch = execute.shape
    plan = make_plan(execute, length, None if dropless else capacity)
    before = slots_before(plan.kept)
    for b in range(batch):
        taken = 0
        for i in range(length):
            assert before[i, b] == taken
            if plan.kept[i, b]:
                assert plan.slots.view(length, batch)[i, b] == taken * batch + b
                taken += 1


@settings(deadline=None)
@given(cases(), st.data())
def test_later_decisions_never_touch_earlier_tokens(
    case: tuple[Tensor, int, int], data: st.DataObject
) -> None:
    execute, group_size, capacity = case
    length, batch = execute.shape
    start = data.draw(st.integers(0, length), label="first changed position")
    bits = data.draw(
        st.lists(st.booleans(), min_size=(length - start) * batch, max_size=(length - start) * batch)
    )
    changed = torch.cat([execute[:start], torch.tensor(bits, dtype=torch.bool).view(-1, batch)])
    before, after = make_plan(*case), make_plan(changed, group_size, capacity)
    assert torch.equal(before.slots[: start * batch], after.slots[: start * batch])
    assert torch.equal(before.kept[:start], after.kept[:start])


@settings(deadline=None)
@given(cases())
def test_dropless_keeps_exactly_the_executed_tokens(case: tuple[Tensor, int, int]) -> None:
    execute, group_size, _ = case
    length, batch = execute.shape
    plan = make_plan(execute, group_size, None)
    assert torch.equal(plan.kept, execute)
    fullest = max(1, int(execute.view(-1, group_size, batch).sum(1).max()))
    groups = length // group_size
    slots = plan.positions.shape[0] // groups
    assert fullest <= slots <= group_size
    assert slots - fullest < max(1, group_size // 16), (
        "what the fullest needs, and less than a sixteenth more"
    )
    check_against_the_walk(plan, execute, group_size, slots)


def test_dropless_plans_have_few_shapes() -> None:
    length = 1000
    shapes = {
        len(make_plan(torch.arange(length).unsqueeze(1) < executed, length, None).rows)
        for executed in range(length + 1)
    }
    assert len(shapes) <= 17


@settings(deadline=None)
@given(cases(), st.data())
def test_a_part_is_the_plan_of_its_rows_alone(case: tuple[Tensor, int, int], data: st.DataObject) -> None:
    execute, group_size, capacity = case
    groups = len(execute) // group_size
    parts = data.draw(st.sampled_from([n for n in range(1, groups + 1) if groups % n == 0]), label="parts")
    plan = make_plan(*case)
    for index, rows in enumerate(execute.chunk(parts)):
        part, alone = plan.part(index, parts), make_plan(rows, group_size, capacity)
        assert torch.equal(part.rows, alone.rows)
        assert torch.equal(part.slots, alone.slots)
        assert torch.equal(part.positions, alone.positions)


def test_overflow_is_dropped_from_the_end_of_each_group_only() -> None:
    execute = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1], dtype=torch.bool).unsqueeze(1)
    plan = make_plan(execute, group_size=4, capacity=2)
    assert plan.kept.squeeze(1).tolist() == [True, True, False, False, True, False, True, False]
    assert plan.positions.squeeze(1).tolist() == [0, 1, 4, 6]


@pytest.mark.parametrize("capacity", [1, 3, 4, None])
def test_nobody_executes(capacity: int | None) -> None:
    plan = make_plan(torch.zeros(8, 2, dtype=torch.bool), 4, capacity)
    assert (plan.slots == -1).all()
    assert not plan.kept.any()
    ends = [3] * (capacity or 1) + [7] * (capacity or 1)
    assert plan.positions.t().tolist() == [ends, ends], "padding names the last row of its group"


def test_everybody_executes() -> None:
    execute = torch.ones(8, 2, dtype=torch.bool)
    for capacity in (4, None):
        plan = make_plan(execute, 4, capacity)
        assert torch.equal(plan.slots, torch.arange(16))
        assert torch.equal(plan.rows, torch.arange(16))


@pytest.mark.parametrize(
    ("factor", "density", "group_size", "expected"),
    [
        (1.0, 0.5, 16, 8),
        (1.25, 0.5, 16, 10),
        (1.05, 0.5, 16, 9),
        (4.0, 0.5, 16, 16),
        (0.01, 0.1, 16, 1),
        (1.0, 1.0, 1, 1),
    ],
)
def test_capacity_is_rounded_up_and_lies_between_one_and_the_group(
    factor: float, density: float, group_size: int, expected: int
) -> None:
    assert group_capacity(factor, density, group_size) == expected


@settings(deadline=None)
@given(
    factor=st.floats(0.01, 4), density=st.floats(0, 1), size=st.integers(1, 200), minimum=st.integers(1, 300)
)
def test_capacity_is_at_least_its_minimum_and_at_most_the_group(
    factor: float, density: float, size: int, minimum: int
) -> None:
    capacity = group_capacity(factor, density, size, minimum)
    assert min(minimum, size) <= capacity <= size
    if minimum < capacity < size:
        assert capacity - 1 < factor * density * size <= capacity + 1e-6


def test_shares_that_are_not_exact_in_binary_get_no_slot_more() -> None:
    """0.07 * 100 is 7.000000000000001."""
    for share in (0.07, 0.14, 0.28, 0.55, 0.56, 0.57):
        assert group_capacity(1.0, share, 100) == round(share * 100)
