"""Collectives with gradients that eager code and compilers see alike.

They return new tensors and change none (torch's functional collectives), so a compiler traces them into the
program of a layer. Collectives into a given buffer, inside an autograd function, were traced wrongly: on a
GPU (torch 2.11) gradients through them came out wrong. Rows are cut and joined along the first dimension;
every rank of the axis calls, and runs backward through, the same collectives in the same order.
"""

from typing import Any

import torch
from torch import Tensor

from skipmega.parallel.grid import Axis

_ops = torch.ops._c10d_functional


def gather_rows_of_ranks(rows: Tensor, axis: Axis) -> Tensor:
    """Every rank's rows, in the order of ranks, without a gradient: [n, ...] to [n * ranks, ...]."""
    if rows.dtype == torch.bool:  # which gloo doesn't move
        return gather_rows_of_ranks(rows.to(torch.uint8), axis).to(torch.bool)
    return _wait(_ops.all_gather_into_tensor(rows.contiguous(), axis.size, axis.group.group_name))


def _scatter_sums(rows: Tensor, axis: Axis) -> Tensor:
    return _wait(_ops.reduce_scatter_tensor(rows.contiguous(), "sum", axis.size, axis.group.group_name))


def _sum(rows: Tensor, axis: Axis) -> Tensor:
    return _wait(_ops.all_reduce(rows.contiguous(), "sum", axis.group.group_name))


def _wait(tensor: Tensor) -> Tensor:
    ready: Tensor = _ops.wait_tensor(tensor)
    return ready


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return gather_rows_of_ranks(rows, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _scatter_sums(grad, ctx.axis), None


class _ScatterSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _scatter_sums(rows, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather_rows_of_ranks(grad, ctx.axis), None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.axis), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, axis: Axis) -> Tensor:
        return _sum(rows, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def gather(rows: Tensor, axis: Axis) -> Tensor:
    """Every rank's rows, in the order of ranks: [n, ...] to [n * ranks, ...]; backward sums the ranks'
    gradients and leaves each those of its own rows."""
    gathered: Tensor = _Gather.apply(rows, axis)
    return gathered


def scatter_sums(rows: Tensor, axis: Axis) -> Tensor:
    """The ranks' summands added up, to each its part of the rows: [n * ranks, ...] to [n, ...]; backward
    gathers."""
    mine: Tensor = _ScatterSums.apply(rows, axis)
    return mine


def copy(rows: Tensor, axis: Axis) -> Tensor:
    """``rows``, the same on all ranks, unchanged; backward sums the ranks' gradients."""
    copied: Tensor = _Copy.apply(rows, axis)
    return copied


def sum_over(rows: Tensor, axis: Axis) -> Tensor:
    """The ranks' summands added up, on every rank; backward hands the gradient, the same on all ranks, on."""
    summed: Tensor = _Sum.apply(rows, axis)
    return summed
