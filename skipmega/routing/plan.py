"""From decisions to slots.

A group is ``group_size`` consecutive tokens of one sequence and has ``capacity`` slots; executed tokens
take them in position order, so whether a token overflows depends on earlier tokens only. Slots left
over are padding. Positions ascend along the slots of a sequence, padding included.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from skipmega.kernels.packing import assign_slots

DROPLESS_SHAPES = 16


@dataclass(frozen=True)
class PackingPlan:
    """Where each executed token goes.

    ``rows`` [n*b] int64: flat row (position * b + sequence) of each flat slot (slot * b + sequence);
    padding slots name the last row of their group. ``slots`` [s*b] int64: the flat slot of each row, -1
    when skipped. ``positions`` [n, b] int64: position of each slot's token.
    """

    rows: Tensor
    slots: Tensor
    positions: Tensor

    @property
    def kept(self) -> Tensor:
        """[s, b] bool: tokens that have a slot."""
        return self.slots.view(-1, self.positions.shape[1]) >= 0

    @property
    def filled(self) -> Tensor:
        """[n*b] bool: flat slots that hold a token and are no padding."""
        owner = self.slots.index_select(0, self.rows)
        return owner == torch.arange(len(self.rows), device=self.rows.device)

    def part(self, index: int, parts: int) -> "PackingPlan":
        """The plan of one of ``parts`` equal parts of the sequence, each of whole groups, by itself."""
        batch = self.positions.shape[1]
        first_row = index * (self.slots.numel() // parts)
        first_slot = index * (self.rows.numel() // parts)
        slots = self.slots.chunk(parts)[index]
        return PackingPlan(
            rows=self.rows.chunk(parts)[index] - first_row,
            slots=torch.where(slots < 0, slots, slots - first_slot),
            positions=self.positions.chunk(parts)[index] - first_row // batch,
        )


def group_capacity(factor: float, density: float, group_size: int, minimum: int = 1) -> int:
    """Slots of a group: ``ceil(factor * density * group_size)``, at least ``minimum``, at most the group."""
    return min(group_size, max(minimum, math.ceil(factor * density * group_size - 1e-9)))


def slots_before(kept: Tensor) -> Tensor:
    """How many earlier tokens of its sequence have a slot: [s, b] bool to [s, b] int64."""
    return _running_count(kept) - kept.long()


def make_plan(execute: Tensor, group_size: int, capacity: int | None) -> PackingPlan:
    """Assign slots.

    Args:
        execute: [s, b] bool.
        group_size: tokens that share a capacity; divides s.
        capacity: slots of a group; None is dropless: as many as the fullest group needs, rounded up to a
            sixteenth of a group (their number is read back from the device).
    """
    length, batch = execute.shape
    if capacity is None:
        grouped = execute.view(length // group_size, group_size, batch)
        # not every number its own shape, which attention libraries plan (and compilers compile) anew
        step = max(1, group_size // DROPLESS_SHAPES)
        capacity = min(group_size, step * math.ceil(max(1, int(grouped.sum(dim=1).max())) / step))
    rows, slots = assign_slots(execute, group_size, capacity)
    return PackingPlan(rows=rows, slots=slots, positions=(rows // batch).view(-1, batch))


@torch.library.custom_op("skipmega::running_count", mutates_args=())
def _running_count(chosen: Tensor) -> Tensor:
    """Number of True up to and including each token of a sequence: [s, b] bool to int64.

    Kept out of compiled graphs: inductor (torch 2.11) cannot fuse what follows a long scan. Scanned along the
    last dimension, since torch scans others with one thread each (measured: H200, 190 us for 32k tokens).
    """
    return chosen.t().contiguous().cumsum(dim=1).t().contiguous()


@_running_count.register_fake
def _(chosen: Tensor) -> Tensor:
    return chosen.new_empty(chosen.shape, dtype=torch.int64)
