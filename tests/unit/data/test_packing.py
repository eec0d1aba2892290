"""Best-fit packing: nothing lost, nothing overfull, as few cuts as there can be."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from skipmega.data.pairs.packing import pack

LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=60)


@given(lengths=LENGTHS, capacity=st.integers(2, 33))
def test_every_token_once_and_no_sample_overfull(lengths: list[int], capacity: int) -> None:
    packing = pack(np.array(lengths, np.int32), capacity)
    seen = {number: np.zeros(length, int) for number, length in enumerate(lengths)}
    filled = -packing.padding.copy() + capacity
    for document, start, tokens, sample in zip(
        packing.document, packing.start, packing.tokens, packing.sample, strict=True
    ):
        seen[document][start : start + tokens] += 1
        filled[sample] -= tokens
        assert tokens == capacity or start + tokens == lengths[document], "full, or it has the end"
    assert not filled.any(), "what fills a sample and its padding are its capacity"
    assert all(0 <= padding < capacity for padding in packing.padding)
    for number, length in enumerate(lengths):
        alone = length % capacity == 1
        assert seen[number].tolist() == [1] * (length - alone) + [0] * alone, "a lone end is left out"
    assert packing.cut == sum(length - (length % capacity == 1) > capacity for length in lengths)


@given(lengths=LENGTHS, capacity=st.integers(2, 33))
def test_best_fit_leaves_no_two_samples_that_would_fit_in_one(lengths: list[int], capacity: int) -> None:
    packing = pack(np.array(lengths, np.int32), capacity)
    filled = np.sort(capacity - packing.padding)
    assert len(filled) < 2 or filled[:2].sum() > capacity


def test_each_piece_goes_where_it_leaves_the_least_room() -> None:
    packing = pack(np.array([6, 3, 7, 4]), 10)
    assert packing.sample.tolist() == [1, 0, 0, 1], "7 + 3 and 6 + 4"
    assert packing.padding.tolist() == [0, 0]
    assert pack(np.array([25, 4]), 10).sample.tolist() == [0, 1, 2, 2]
