"""Which blocks of keys the blocks of packed queries see, and the other way round.

Queries ascend, and so do the first positions that they may see. So what a block sees is one range of blocks,
of which it sees all pairs in one range again: two ranges say everything, and no list has to be sorted.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128


class BlockLists(NamedTuple):
    """For each block of one side, blocks of the other side, ascending; entries beyond a count are any block.

    Shapes: counts [b, blocks of this side], lists [b, blocks of this side, blocks of the other], int32.
    """

    partial_count: Tensor
    partial: Tensor
    full_count: Tensor
    full: Tensor


class SeenBlocks(NamedTuple):
    """Blocks of keys by block of queries, and blocks of queries by block of keys."""

    keys: BlockLists
    queries: BlockLists


def seen_blocks(at: Tensor, since: Tensor, length: int) -> SeenBlocks:
    """Tell pairs of blocks of which everybody sees everybody (full), somebody may see somebody (partial),
    and all others.

    Args:
        at: [b, q] integers, each query's position in its sequence, ascending.
        since: [b, q] integers, the first position each query may see, ascending.
        length: number of keys.

    Between documents a block may be called partial though nothing in it is seen, and the last block of keys
    is if it has fewer than the others: that costs time only, what a query sees of a partial block is decided
    pair by pair.
    """
    queries = at.shape[1]
    starts = torch.arange(0, queries, BLOCK, device=at.device)
    ends = (starts + BLOCK - 1).clamp(max=queries - 1)
    some = _Range(since[:, starts] // BLOCK, at[:, ends] // BLOCK + 1)
    every = _Range((since[:, ends] + BLOCK - 1) // BLOCK, (at[:, starts] + 1) // BLOCK)
    blocks = (length + BLOCK - 1) // BLOCK
    return SeenBlocks(
        _lists(some, every, blocks),
        _lists(some.transposed(blocks), every.transposed(blocks), len(starts)),
    )


class _Range(NamedTuple):
    """Of each row, the columns from ``first`` to before ``end``: two [b, rows], both ascending along rows."""

    first: Tensor
    end: Tensor

    def transposed(self, columns: int) -> "_Range":
        """Of each column, the rows whose ranges hold it; none if the end is not beyond the first."""
        column = torch.arange(columns, device=self.first.device)
        return _Range(
            (self.end.unsqueeze(2) <= column).sum(dim=1), (self.first.unsqueeze(2) <= column).sum(dim=1)
        )


def _lists(some: _Range, every: _Range, columns: int) -> BlockLists:
    """Of each row, ``every``'s columns, if there are any some of ``some``'s, and ``some``'s others."""
    index = torch.arange(columns, device=some.first.device)
    full_count = (every.end - every.first).clamp(min=0)
    before = (every.first - some.first).unsqueeze(2)
    partial = some.first.unsqueeze(2) + index + torch.where(index >= before, full_count.unsqueeze(2), 0)
    lists = (
        some.end - some.first - full_count,
        partial.clamp(max=columns - 1),
        full_count,
        (every.first.unsqueeze(2) + index).clamp(max=columns - 1),
    )
    return BlockLists(*(part.int() for part in lists))
