"""Logical tensors: what a parameter is when the grid is forgotten.

A tensor-parallel rank holds a contiguous part of the logical tensor along one dimension, or all of it.
"""

from dataclasses import dataclass

from torch import Tensor

from skipmega.parallel.grid import Axis


@dataclass(frozen=True)
class LogicalTensor:
    """This rank's part of a logical tensor: cut along ``dim`` over the tensor axis, whole if None."""

    local: Tensor
    dim: int | None


def partition_dim(parameter: Tensor) -> int | None:
    """The dimension of ``parameter`` that is cut over the tensor axis, None when it is replicated."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return int(parameter.partition_dim)  # type: ignore[attr-defined]


def logical_shape(parameter: Tensor, axis: Axis) -> tuple[int, ...]:
    """Shape of the whole tensor that ``parameter`` is this rank's part of."""
    shape = list(parameter.shape)
    dim = partition_dim(parameter)
    if dim is not None:
        shape[dim] *= axis.size
    return tuple(shape)


def local_shard(logical: Tensor, parameter: Tensor, axis: Axis) -> Tensor:
    """This tensor-parallel rank's part of the whole tensor ``logical``."""
    dim = partition_dim(parameter)
    return logical if dim is None else logical.chunk(axis.size, dim)[axis.rank]
