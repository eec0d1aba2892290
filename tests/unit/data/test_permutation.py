"""Orders that are computed entry by entry."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipmega.data.permutation import Permutation


@given(size=st.integers(1, 400), key=st.integers(0, 3))
def test_every_number_comes_once(size: int, key: int) -> None:
    order = Permutation(size, key)
    assert sorted(order[place] for place in range(len(order))) == list(range(size))


@given(size=st.integers(1, 10**12), data=st.data())
def test_large_orders_stay_in_range(size: int, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, size - 1))
    assert 0 <= Permutation(size, "x")[place] < size


def test_places_outside_are_refused() -> None:
    for place in (-1, 5):
        with pytest.raises(IndexError, match=f"place {place} of 5"):
            Permutation(5)[place]


def test_orders_of_different_keys_have_nothing_in_common() -> None:
    orders = [[Permutation(5000, key, epoch)[i] for i in range(5000)] for key in "ab" for epoch in (0, 1)]
    for number, one in enumerate(orders):
        for other in [list(range(5000)), *orders[:number]]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 12, "one is expected by chance"


def test_neighbours_do_not_stay_neighbours() -> None:
    """Places of a tenth of the order hold numbers of all tenths, as many of each as chance gives."""
    order = Permutation(10_000, 7)
    for tenth in range(10):
        counts = [0] * 10
        for place in range(1000 * tenth, 1000 * (tenth + 1)):
            counts[order[place] // 1000] += 1
        assert sum((count - 100) ** 2 / 100 for count in counts) < 33  # chi-square of 9: once in 10,000


def test_the_order_never_changes() -> None:
    """What runs were started with they must read to their end: these numbers are not to be updated."""
    assert [Permutation(1000, 1234, "web", 0)[place] for place in range(5)] == FIRST_OF_1000
    assert [Permutation(10**9, 1234, "web", 3)[place] for place in range(3)] == FIRST_OF_10_TO_9


FIRST_OF_1000 = [905, 570, 92, 521, 924]
FIRST_OF_10_TO_9 = [202697605, 68458554, 460723757]
