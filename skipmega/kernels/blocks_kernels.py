"""Triton's kernel of :mod:`skipmega.kernels.blocks`: one program a block of queries or keys of a sequence."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _seen_at(
    positions, since, sequence, query, inside, length, stride, batch_stride, DOCUMENTS: tl.constexpr
):
    """The last and the first position that queries may see."""
    at = tl.load(positions + query * stride + sequence * batch_stride, mask=inside, other=0).to(tl.int32)
    first = tl.zeros_like(at)
    if DOCUMENTS:
        first = tl.load(since + sequence * length + at, mask=inside, other=0).to(tl.int32)
    return at, first


@triton.jit
def _ranges(positions, since, sequence, block, queries, length, stride, batch_stride,
            DOCUMENTS: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """Of blocks of queries: first and end of the blocks of keys that somebody sees, and everybody."""
    start = block * SIZE
    inside = start < queries
    last = tl.minimum(start + SIZE - 1, queries - 1)
    first_at, first_since = _seen_at(
        positions, since, sequence, start, inside, length, stride, batch_stride, DOCUMENTS
    )
    last_at, last_since = _seen_at(
        positions, since, sequence, last, inside, length, stride, batch_stride, DOCUMENTS
    )
    return (
        first_since // SIZE, last_at // SIZE + 1, (last_since + SIZE - 1) // SIZE, (first_at + 1) // SIZE
    )  # fmt: skip


@triton.jit
def _store_lists(partial_count, partial, full_count, full, row, columns, some_first, some_end, first, end,
                 COLUMNS: tl.constexpr):  # fmt: skip
    index = tl.arange(0, COLUMNS)
    inside = index < columns
    whole = tl.maximum(end - first, 0)
    shifted = some_first + index + tl.where(index >= first - some_first, whole, 0)
    tl.store(partial_count + row, some_end - some_first - whole)
    tl.store(full_count + row, whole)
    tl.store(partial + row * columns + index, tl.minimum(shifted, columns - 1), mask=inside)
    tl.store(full + row * columns + index, tl.minimum(first + index, columns - 1), mask=inside)


@triton.jit
def _list_blocks(
    positions, since, until, first_seen,
    keys_0, keys_1, keys_2, keys_3, asking_0, asking_1, asking_2, asking_3,
    queries, length, stride, batch_stride, asking_blocks, key_blocks,
    DOCUMENTS: tl.constexpr, SIZE: tl.constexpr, ASKING: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    if block < asking_blocks:
        query = block * SIZE + tl.arange(0, SIZE)
        inside = query < queries
        at, first = _seen_at(
            positions, since, sequence, query, inside, length, stride, batch_stride, DOCUMENTS
        )
        tl.store(until + sequence * queries + query, at, mask=inside)
        tl.store(first_seen + sequence * queries + query, first, mask=inside)
        some, some_end, every, every_end = _ranges(
            positions, since, sequence, block, queries, length, stride, batch_stride, DOCUMENTS, SIZE
        )
        _store_lists(keys_0, keys_1, keys_2, keys_3, sequence * asking_blocks + block, key_blocks,
                     some, some_end, every, every_end, KEYS)  # fmt: skip
    else:
        column = block - asking_blocks
        rows = tl.arange(0, ASKING)
        is_row = rows < asking_blocks
        firsts, ends, full_firsts, full_ends = _ranges(
            positions, since, sequence, rows, queries, length, stride, batch_stride, DOCUMENTS, SIZE
        )
        _store_lists(
            asking_0, asking_1, asking_2, asking_3, sequence * key_blocks + column, asking_blocks,
            tl.sum((is_row & (ends <= column)).to(tl.int32), axis=0),
            tl.sum((is_row & (firsts <= column)).to(tl.int32), axis=0),
            tl.sum((is_row & (full_ends <= column)).to(tl.int32), axis=0),
            tl.sum((is_row & (full_firsts <= column)).to(tl.int32), axis=0),
            ASKING,
        )  # fmt: skip


def list_blocks(positions: Tensor, since: Tensor | None, length: int, size: int) -> list[Tensor]:
    """See :func:`skipmega.kernels.blocks.seen_blocks`; ``size`` is that of blocks, a power of two."""
    queries, batch = positions.shape
    asking, keys = triton.cdiv(queries, size), triton.cdiv(length, size)

    def integers(*shape: int) -> Tensor:
        return torch.empty((batch, *shape), dtype=torch.int32, device=positions.device)

    bounds = [integers(queries), integers(queries)]
    by_queries = [integers(asking), integers(asking, keys), integers(asking), integers(asking, keys)]
    by_keys = [integers(keys), integers(keys, asking), integers(keys), integers(keys, asking)]
    _list_blocks[(asking + keys, batch)](
        positions, positions if since is None else since.contiguous(), *bounds, *by_queries, *by_keys,
        queries, length, *positions.stride(), asking, keys,
        since is not None, size, triton.next_power_of_2(asking), triton.next_power_of_2(keys), num_warps=4,
    )  # fmt: skip
    return [*bounds, *by_queries, *by_keys]
