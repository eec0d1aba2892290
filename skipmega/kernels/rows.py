"""Moving rows between the full and the packed layout.

Rows are unique, so the backward of a gather is a gather by the inverse index: no atomics, deterministic,
and one kernel each way. ``rows`` [m] names the full row of each slot, ``slots`` [n] the slot of each full
row or -1. Slots that no row names are padding: their content is real data (some row), their gradient
is zero and their result is never written back.
"""

from typing import Any

import torch
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return full.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return _select_or_zero(grad, slots), None, None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: Tensor, update: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(rows, slots)
        taken = (slots >= 0).unsqueeze(1)
        return torch.where(taken, full + update.index_select(0, slots.clamp(min=0)), full)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, slots = ctx.saved_tensors
        owner = slots.index_select(0, rows)
        real = owner == torch.arange(rows.shape[0], device=rows.device)
        packed = grad.index_select(0, rows)
        return grad, torch.where(real.unsqueeze(1), packed, torch.zeros_like(packed)), None, None


def gather_rows(full: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """Pack: [n, width] to [m, width], slot i holding row ``rows[i]``.

    Args:
        full: [n, width], any float dtype.
        rows: [m] int64, each in 0..n-1.
        slots: [n] int64, the inverse: -1 or the one slot that is this row's.
    """
    packed: Tensor = _GatherRows.apply(full, rows, slots)
    return packed


def add_rows(full: Tensor, update: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """Write back: ``full`` [n, width] plus each row's slot of ``update`` [m, width].

    Rows without a slot are bit-identical to ``full``.
    """
    combined: Tensor = _AddRows.apply(full, update, rows, slots)
    return combined


def _select_or_zero(packed: Tensor, slots: Tensor) -> Tensor:
    taken = (slots >= 0).unsqueeze(1)
    chosen = packed.index_select(0, slots.clamp(min=0))
    return torch.where(taken, chosen, torch.zeros_like(chosen))
