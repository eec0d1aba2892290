"""Dealing out slots: executed tokens take those of their group in order."""

import torch
from torch import Tensor


@torch.library.custom_op("skipmega::assign_slots", mutates_args=())
def assign_slots(execute: Tensor, group_size: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Give each executed token a slot, while its group has some.

    Args:
        execute: [s, b] bool.
        group_size: consecutive tokens of one sequence that share slots; divides s.
        capacity: slots of a group.

    Returns:
        ``rows`` [n*b] int64, of each flat slot (slot * b + sequence) the flat row (position * b + sequence)
        that takes it, slots left over naming the last row of their group; ``slots`` [s*b] int64, the flat
        slot of each row or -1.
    """
    length, batch = execute.shape
    groups, device = length // group_size, execute.device
    grouped = execute.view(groups, group_size, batch)
    order = grouped.cumsum(dim=1) - 1
    kept = (grouped & (order < capacity)).view(-1)
    first_slot = torch.arange(groups, device=device).view(groups, 1, 1) * capacity
    sequence = torch.arange(batch, device=device)
    flat_slot = ((first_slot + order) * batch + sequence).view(-1)
    last_row = (torch.arange(1, groups + 1, device=device) * group_size - 1).view(groups, 1, 1)
    rows = (last_row * batch + sequence).expand(groups, capacity, batch).reshape(-1).clone()
    rows[flat_slot[kept]] = kept.nonzero().squeeze(1)
    return rows, torch.where(kept, flat_slot, -1)


@assign_slots.register_fake
def _(execute: Tensor, group_size: int, capacity: int) -> tuple[Tensor, Tensor]:
    length, batch = execute.shape
    slots = length // group_size * capacity
    return tuple(execute.new_empty(rows * batch, dtype=torch.int64) for rows in (slots, length))  # type: ignore


@assign_slots.register_kernel("cuda")
def _(execute: Tensor, group_size: int, capacity: int) -> tuple[Tensor, Tensor]:
    from skipmega.kernels.packing_kernels import assign

    return assign(execute.contiguous(), group_size, capacity)
