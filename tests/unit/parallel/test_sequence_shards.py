"""Which tokens of a sequence each process holds, without communication."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipmega.parallel.grid import Axis
from skipmega.parallel.sequence import SequenceShards

CPU = torch.device("cpu")


def axis(size: int, rank: int) -> Axis:
    return Axis(size=size, rank=rank, group=None)  # type: ignore[arg-type]


def all_shards(context: int, tensor: int, over_tensor: bool) -> list[list[SequenceShards]]:
    """The cut as each process of a grid of one replica sees it, by context rank and tensor rank."""

    def seen_by(c: int, t: int) -> SequenceShards:
        both = axis(context * tensor, c * tensor + t) if over_tensor else axis(context, c)
        return SequenceShards(
            tensor=axis(tensor, t), context=axis(context, c), both=both, tokens=both, over_tensor=over_tensor
        )

    return [[seen_by(c, t) for t in range(tensor)] for c in range(context)]


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, bool, int]:
    """Context and tensor ranks, whether the latter cut tokens, and a length that may be so cut."""
    context, tensor, over_tensor = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.booleans())
    parts = math.lcm(context * (tensor if over_tensor else 1), 2 * context if context > 1 else 1)
    return context, tensor, over_tensor, parts * draw(st.integers(1, 7))


def ascends(positions: Tensor) -> bool:
    return bool((positions.diff() > 0).all())


@settings(deadline=None)
@given(cuts())
def test_every_token_is_on_one_rank_and_ascends_there(cut: tuple[int, int, bool, int]) -> None:
    context, tensor, over_tensor, length = cut
    shards = all_shards(context, tensor, over_tensor)
    for t in range(tensor):
        by_context = [ranks[t].context_positions(length, CPU) for ranks in shards]
        assert torch.equal(torch.cat(by_context).sort().values, torch.arange(length))
        assert {len(positions) for positions in by_context} == {length // context}
        assert all(map(ascends, by_context))
        assert len({int(positions.sum()) for positions in by_context}) == 1, "all attend to as many"
    every = [[rank.positions(length, CPU) for rank in ranks] for ranks in shards]
    for ranks, positions in zip(shards, every, strict=True):
        assert all(map(ascends, positions))
        parts = torch.cat(positions) if over_tensor else positions[0]
        assert torch.equal(parts, ranks[0].context_positions(length, CPU)), "in the order that enter() makes"
    held = torch.cat([p for positions in every for p in (positions if over_tensor else positions[:1])])
    assert torch.equal(held.sort().values, torch.arange(length))
    assert {len(p) for positions in every for p in positions} == {length // shards[0][0].both.size}


@settings(deadline=None, max_examples=50)
@given(cuts(), st.integers(0, 2))
def test_rows_are_taken_at_their_positions(cut: tuple[int, int, bool, int], dim: int) -> None:
    context, tensor, over_tensor, length = cut
    numbered = torch.arange(length).view([-1 if d == dim else 1 for d in range(3)])
    whole = numbered.expand([length if d == dim else 2 for d in range(3)])
    for ranks in all_shards(context, tensor, over_tensor):
        for rank in ranks:
            for taken, positions in (
                (rank.take(whole, dim), rank.positions(length, CPU)),
                (rank.take_context(whole, dim), rank.context_positions(length, CPU)),
            ):
                assert torch.equal(taken.movedim(dim, 0), positions.view(-1, 1, 1).expand(-1, 2, 2))


@pytest.mark.parametrize(
    ("context", "tensor", "over_tensor", "expected"),
    [
        (1, 2, True, [[[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]]),
        (1, 2, False, [[[*range(12)], [*range(12)]]]),
        (2, 1, False, [[[0, 1, 2, 9, 10, 11]], [[3, 4, 5, 6, 7, 8]]]),
        (2, 3, True, [[[0, 1], [2, 9], [10, 11]], [[3, 4], [5, 6], [7, 8]]]),
        (3, 1, True, [[[0, 1, 10, 11]], [[2, 3, 8, 9]], [[4, 5, 6, 7]]]),
    ],
)
def test_cuts_written_down(
    context: int, tensor: int, over_tensor: bool, expected: list[list[list[int]]]
) -> None:
    shards = all_shards(context, tensor, over_tensor)
    assert [[rank.positions(12, CPU).tolist() for rank in ranks] for ranks in shards] == expected


@settings(deadline=None, max_examples=50)
@given(cuts())
def test_gathered_rows_are_put_in_order(cut: tuple[int, int, bool, int]) -> None:
    """What the ranks' rows are, one after the other, once they have been gathered."""
    context, tensor, over_tensor, length = cut
    shards = all_shards(context, tensor, over_tensor)
    holders = tensor if over_tensor else 1
    every = [rank.positions(length, CPU) for ranks in shards for rank in ranks[:holders]]
    assert torch.equal(shards[0][0]._in_order(torch.cat(every)), torch.arange(length))


@pytest.mark.parametrize(("over_tensor", "summed"), [(True, 3), (False, 1)])
def test_replicated_parameters_see_the_tokens_of_the_ranks_that_share_them(
    over_tensor: bool, summed: int
) -> None:
    for ranks in all_shards(2, 3, over_tensor):
        assert {rank.summed for rank in ranks} == {summed}
        assert not any(rank.are_one for rank in ranks)


def test_nothing_is_cut_over_one_rank() -> None:
    whole = torch.randn(5, 2)
    for tensor in (1, 3):
        for ranks in all_shards(1, tensor, over_tensor=False):
            for rank in ranks:
                assert rank.are_one
                assert rank.take(whole, 0) is whole
                assert rank.take_context(whole, 0) is whole
    ((alone,),) = all_shards(1, 1, over_tensor=False)
    for move in (alone.enter, alone.leave, alone.gather_context, alone.whole, alone.over_tensor_ranks):
        assert move(whole) is whole
