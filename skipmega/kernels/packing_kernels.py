"""Triton's kernel of :mod:`skipmega.kernels.packing`: one program a group of a sequence, one pass over it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST = 8192  # tokens that are counted at once


@triton.jit
def _assign(execute, rows, slots, group_size, capacity, batch, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    first_row, first_slot = group * group_size, group * capacity
    offsets = tl.arange(0, BLOCK)
    taken = tl.zeros((), tl.int32)
    for start in range(0, group_size, BLOCK):
        inside = start + offsets < group_size
        row = (first_row + start + offsets) * batch + sequence
        executed = tl.load(execute + row, mask=inside, other=0).to(tl.int32)
        order = taken + tl.cumsum(executed, axis=0) - executed
        kept = (executed == 1) & (order < capacity)
        slot = (first_slot + order) * batch + sequence
        tl.store(slots + row, tl.where(kept, slot, -1), mask=inside)
        tl.store(rows + slot, row, mask=kept)
        taken += tl.sum(executed, axis=0)
    last_row = (first_row + group_size - 1) * batch + sequence
    for start in range(0, capacity, BLOCK):
        order = start + offsets
        left_over = (order >= taken) & (order < capacity)
        tl.store(rows + (first_slot + order) * batch + sequence, last_row, mask=left_over)


def assign(execute: Tensor, group_size: int, capacity: int, most: int = _MOST) -> tuple[Tensor, Tensor]:
    """See :func:`skipmega.kernels.packing.assign_slots`; ``execute`` contiguous, ``most`` tokens at once."""
    length, batch = execute.shape
    groups = length // group_size
    rows = torch.empty(groups * capacity * batch, dtype=torch.int64, device=execute.device)
    slots = torch.empty(length * batch, dtype=torch.int64, device=execute.device)
    block = min(triton.next_power_of_2(group_size), most)
    warps = max(1, min(16, block // 256))
    flags = execute.view(torch.uint8)
    _assign[(batch, groups)](flags, rows, slots, group_size, capacity, batch, block, num_warps=warps)
    return rows, slots
