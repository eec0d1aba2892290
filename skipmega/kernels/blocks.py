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
    """The last and the first position each query may see, both [b, q] int32; blocks of keys by block of
    queries, and blocks of queries by block of keys."""

    until: Tensor
    since: Tensor
    keys: BlockLists
    queries: BlockLists


def seen_blocks(positions: Tensor | None, since: Tensor | None, length: int, batch: int) -> SeenBlocks:
    """Tell pairs of blocks of which everybody sees everybody (full), somebody may see somebody (partial),
    and all others.

    Between documents a block may be called partial though nothing in it is seen, and the last block of keys
    is if it has fewer than the others: that costs time only, what a query sees of a partial block is decided
    pair by pair.

    Args:
        positions: [q, b] int64, each query's position in its sequence, ascending; None where all tokens ask.
        since: [b, s] int64, the first position each token may see, ascending; None for 0.
        length: number of keys.
        batch: number of sequences.
    """
    if positions is None:
        device = None if since is None else since.device
        positions = torch.arange(length, device=device).unsqueeze(1).expand(-1, batch)
    until, first, *lists = _seen_blocks(positions, since, length)
    return SeenBlocks(until, first, BlockLists(*lists[:4]), BlockLists(*lists[4:]))


@torch.library.custom_op("skipmega::seen_blocks", mutates_args=())
def _seen_blocks(positions: Tensor, since: Tensor | None, length: int) -> list[Tensor]:
    """All of a :class:`SeenBlocks`, contiguous.

    An operator, since attention reads these as they lie in memory. Computed in the same compiled graph they
    may never be laid out so: attention is then silently wrong, or does not compile (measured: torch 2.11,
    H200, relative error 0.5; the GPU tests compare).
    """
    at = positions.t()
    first = torch.zeros_like(at) if since is None else since.gather(1, at)
    queries = at.shape[1]
    starts = torch.arange(0, queries, BLOCK, device=at.device)
    ends = (starts + BLOCK - 1).clamp(max=queries - 1)
    some = _Range(first[:, starts] // BLOCK, at[:, ends] // BLOCK + 1)
    every = _Range((first[:, ends] + BLOCK - 1) // BLOCK, (at[:, starts] + 1) // BLOCK)
    blocks = (length + BLOCK - 1) // BLOCK
    keys = _lists(some, every, blocks)
    asking = _lists(some.transposed(blocks), every.transposed(blocks), len(starts))
    return [part.int().contiguous() for part in (at, first, *keys, *asking)]


@_seen_blocks.register_fake
def _(positions: Tensor, since: Tensor | None, length: int) -> list[Tensor]:
    queries, batch = positions.shape
    asking, keys = (-(-count // BLOCK) for count in (queries, length))
    both = [[(asking,), (asking, keys)] * 2, [(keys,), (keys, asking)] * 2]
    shapes = [(queries,), (queries,), *both[0], *both[1]]
    return [positions.new_empty((batch, *shape), dtype=torch.int32) for shape in shapes]


@_seen_blocks.register_kernel("cuda")
def _(positions: Tensor, since: Tensor | None, length: int) -> list[Tensor]:
    from skipmega.kernels.blocks_kernels import list_blocks

    return list_blocks(positions, since, length, BLOCK)


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
    return BlockLists(
        some.end - some.first - full_count,
        partial.clamp(max=columns - 1),
        full_count,
        (every.first.unsqueeze(2) + index).clamp(max=columns - 1),
    )
