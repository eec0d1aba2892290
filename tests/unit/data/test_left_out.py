"""Samples that are passed over."""

from hypothesis import given
from hypothesis import strategies as st

from skipmega.data.order.left_out import LeftOut

RANGES = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 10)).map(lambda pair: [pair[0], pair[0] + pair[1]]),
    max_size=6,
)


@given(RANGES)
def test_the_rest_comes_in_order(ranges: list[list[int]]) -> None:
    bad = {number for first, last in ranges for number in range(first, last + 1)}
    rest = [number for number in range(200) if number not in bad]
    assert [LeftOut(ranges).number(index) for index in range(len(rest))] == rest


@given(RANGES, st.integers(0, 90))
def test_what_lies_before(ranges: list[list[int]], number: int) -> None:
    bad = {bad for first, last in ranges for bad in range(first, last + 1) if bad < number}
    found = [bad for first, last in LeftOut(ranges).before(number) for bad in range(first, last + 1)]
    assert found == sorted(bad)
