"""Initial weights as a pure function of (seed, logical name): the same on every grid."""

import hashlib
import math

import torch
from torch import nn

from skipmega.config import RunConfig
from skipmega.parallel.grid import Axis
from skipmega.parallel.logical import local_shard, logical_shape


def initialize(module: nn.Module, config: RunConfig, axis: Axis) -> None:
    """Fill every parameter of a stage in place.

    Norms are one, biases zero, matrices normal with ``model.init_std``; those that write into the residual
    stream are scaled by ``1/sqrt(2 * layers)`` (GPT-2). The logical tensor is drawn whole on the CPU and cut
    for this tensor-parallel rank.
    """
    std = config.model.init_std
    residual_std = std / math.sqrt(2 * config.model.num_layers)
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            if name.endswith(".bias"):
                parameter.zero_()
                continue
            scale = residual_std if name.endswith(("output.weight", "down.weight")) else std
            drawn = torch.empty(logical_shape(parameter, axis)).normal_(
                std=scale, generator=_generator(config.training.seed, name)
            )
            parameter.copy_(local_shard(drawn, parameter, axis))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
