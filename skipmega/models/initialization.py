"""Initial weights as a pure function of (seed, logical name): the same on every grid."""

import hashlib
import math

import torch
from torch import Tensor, nn

from skipmega.config import RunConfig
from skipmega.parallel.grid import Axis


def initialize(module: nn.Module, config: RunConfig, axis: Axis) -> None:
    """Fill every parameter of a stage in place.

    Norms are one, matrices normal with ``model.init_std``; those that write into the residual stream are
    scaled by ``1/sqrt(2 * layers)`` (GPT-2). The logical tensor is drawn whole on the CPU and cut for this
    tensor-parallel rank.
    """
    std = config.model.init_std
    residual_std = std / math.sqrt(2 * config.model.num_layers)
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            scale = residual_std if name.endswith(("output.weight", "down.weight")) else std
            drawn = torch.empty(logical_shape(parameter, axis)).normal_(
                std=scale, generator=_generator(config.training.seed, name)
            )
            parameter.copy_(local_shard(drawn, parameter, axis))


def partition_dim(parameter: Tensor) -> int | None:
    """The dimension cut over the tensor axis, None when the parameter is replicated."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return int(parameter.partition_dim)


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


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
