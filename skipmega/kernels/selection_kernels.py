"""Triton's kernel of :mod:`skipmega.kernels.selection`.

A float's bits, the sign's turned and those of negative ones all turned, ascend as unsigned integers do. The
result is built from its highest bit: a bit is set where fewer than ``rank`` numbers would lie below.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST = 16384  # numbers that one program keeps in registers; of more, chunks are read again for every bit


@triton.jit
def _ascending(numbers):
    bits = numbers.to(tl.uint32, bitcast=True)
    return bits ^ tl.where((bits >> 31) == 1, 0xFFFFFFFF, 0x80000000).to(tl.uint32)


@triton.jit
def _select(values, result, rank, inner, n, ONE_CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    group = tl.program_id(0)
    first = values + (group // inner).to(tl.int64) * n * inner + group % inner
    offsets = tl.arange(0, BLOCK)
    # what is beyond the end is no number that is smaller than any
    kept = _ascending(tl.load(first + offsets * inner, mask=offsets < n, other=float("nan")))
    found, bit = tl.full((), 0, tl.uint32), tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = found | bit
        if ONE_CHUNK:
            below = tl.sum((kept < candidate).to(tl.int32), axis=0)
        else:
            below = tl.zeros((), tl.int32)
            for start in range(0, n, BLOCK):
                inside = start + offsets < n
                numbers = tl.load(first + (start + offsets) * inner, mask=inside, other=float("nan"))
                below += tl.sum((_ascending(numbers) < candidate).to(tl.int32), axis=0)
        found = tl.where(below < rank, candidate, found)
        bit = bit >> 1
    bits = tl.where((found >> 31) == 1, found ^ 0x80000000, found ^ 0xFFFFFFFF).to(tl.uint32)
    tl.store(result + group, bits.to(tl.float32, bitcast=True))


def select(values: Tensor, rank: int, most: int = _MOST) -> Tensor:
    """See :func:`skipmega.kernels.selection.kth_smallest`; ``values`` contiguous, ``most`` in registers."""
    groups, n, inner = values.shape
    result = torch.empty((groups, inner), dtype=values.dtype, device=values.device)
    block = min(triton.next_power_of_2(n), most)
    warps = max(4, min(32, block // 256))
    _select[(groups * inner,)](values, result, rank, inner, n, n <= block, block, num_warps=warps)
    return result
