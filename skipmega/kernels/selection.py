"""The k-th smallest of many numbers, without sorting them."""

import torch
from torch import Tensor


@torch.library.custom_op("skipmega::kth_smallest", mutates_args=())
def kth_smallest(values: Tensor, rank: int) -> Tensor:
    """Select along the middle dimension. Equal numbers count one by one; nothing is differentiable.

    Args:
        values: [groups, n, inner] float32.
        rank: 1 for the smallest, n for the greatest.

    Returns:
        [groups, inner] float32.
    """
    return values.kthvalue(rank, dim=1).values.contiguous()


@kth_smallest.register_fake
def _(values: Tensor, rank: int) -> Tensor:
    return values.new_empty((values.shape[0], values.shape[2]))


@kth_smallest.register_kernel("cuda")
def _(values: Tensor, rank: int) -> Tensor:
    from skipmega.kernels.selection_kernels import select

    return select(values.contiguous(), rank)
