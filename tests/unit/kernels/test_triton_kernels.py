"""Triton's kernels give what plain torch gives, bit by bit; in its interpreter where there is no GPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipmega.kernels.attention import document_starts
from skipmega.kernels.blocks import _seen_blocks
from skipmega.kernels.packing import assign_slots
from skipmega.kernels.selection import kth_smallest
from support.triton_kernels import DEVICE, needs_triton

pytestmark = needs_triton()
few = settings(deadline=None, max_examples=40)


@st.composite
def numbers(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """[groups, n, inner] float32 with ties, zeros of both signs and infinities; a rank; a size of chunks."""
    groups, n, inner = draw(st.integers(1, 3)), draw(st.integers(1, 70)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    values = torch.randn(groups, n, inner, generator=generator) * 10.0 ** draw(st.integers(-30, 30))
    special = torch.tensor([0.0, -0.0, 1.0, math.inf, -math.inf, 1e-40])
    chosen = torch.randint(0, 12, values.shape, generator=generator)
    values = torch.where(chosen < 6, special[chosen.clamp(max=5)], values)
    return values, draw(st.integers(1, n)), draw(st.sampled_from([16, 128]))


@few
@given(numbers())
def test_the_kth_smallest(drawn: tuple[Tensor, int, int]) -> None:
    from skipmega.kernels.selection_kernels import select

    values, rank, most = drawn
    expected = kth_smallest(values, rank)
    assert torch.equal(expected, values.sort(dim=1).values[:, rank - 1])
    assert torch.equal(select(values.to(DEVICE), rank, most).cpu(), expected)


def test_numbers_that_are_none_are_the_greatest() -> None:
    from skipmega.kernels.selection_kernels import select

    values = torch.tensor([3.0, math.nan, math.inf, -1.0]).view(1, -1, 1)
    found = [float(select(values.to(DEVICE), rank)) for rank in (1, 2, 3)]
    assert found == [-1.0, 3.0, math.inf]
    assert math.isnan(select(values.to(DEVICE), 4))


@few
@given(st.data())
def test_slots_are_dealt_in_order(data: st.DataObject) -> None:
    from skipmega.kernels.packing_kernels import assign

    group_size, groups = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 4))
    capacity, batch = data.draw(st.integers(1, group_size)), data.draw(st.integers(1, 3))
    torch.manual_seed(data.draw(st.integers(0, 10_000)))
    share = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    execute = torch.rand(groups * group_size, batch) < share
    found = assign(execute.to(DEVICE), group_size, capacity, most=data.draw(st.sampled_from([16, 64])))
    for result, expected in zip(found, assign_slots(execute, group_size, capacity), strict=True):
        assert torch.equal(result.cpu(), expected)


@few
@given(st.data())
def test_blocks_are_listed(data: st.DataObject) -> None:
    from skipmega.kernels.blocks_kernels import list_blocks

    length = data.draw(st.sampled_from([1, 100, 128, 129, 300, 1200]))
    queries = data.draw(st.sampled_from([1, 127, 128, 130, 700]))
    torch.manual_seed(data.draw(st.integers(0, 10_000)))
    positions = torch.randint(data.draw(st.integers(0, length - 1)), length, (queries, 2)).sort(dim=0).values
    since = document_starts((torch.rand(2, length) < 0.02).long().cumsum(1))
    for documents in (None, since):
        expected = _seen_blocks(positions, documents, length)
        found = list_blocks(
            positions.to(DEVICE), None if documents is None else documents.to(DEVICE), length, 128
        )
        for result, reference in zip(found, expected, strict=True):
            assert torch.equal(result.cpu(), reference)


def test_positions_may_lie_in_memory_as_they_like() -> None:
    from skipmega.kernels.blocks_kernels import list_blocks

    positions = torch.arange(300, device=DEVICE).unsqueeze(1).expand(-1, 2)
    transposed = positions.t().contiguous().t()
    for found in (list_blocks(positions, None, 300, 128), list_blocks(transposed, None, 300, 128)):
        for result, reference in zip(found, _seen_blocks(positions.cpu(), None, 300), strict=True):
            assert torch.equal(result.cpu(), reference)


@pytest.mark.parametrize("n", [1, 2048, 16384, 40000])
def test_sizes_as_in_training(n: int) -> None:
    """A micro-batch's scores at a time; more than registers hold are read in chunks."""
    from skipmega.kernels.selection_kernels import select

    values = torch.randn(1, n, 1, generator=torch.Generator().manual_seed(n))
    rank = math.ceil(0.3 * n)
    assert torch.equal(select(values.to(DEVICE), rank).cpu(), kth_smallest(values, rank))
