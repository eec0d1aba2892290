"""Initial weights as a pure function of (seed, logical name): the same on every grid."""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from skipmega.config import RunConfig
from skipmega.parallel.grid import Axis
from skipmega.parallel.logical import local_shard, logical_shape

DRAWN_AT_ONCE = (
    8  # tensors; one is drawn by one thread, which for billions of numbers is what a start waits for
)


def initialize(module: nn.Module, config: RunConfig, axis: Axis) -> None:
    """Fill every parameter of a stage in place.

    Norms are one, biases zero, matrices normal with ``model.init_std``; those that write into the residual
    stream are scaled by ``1/sqrt(2 * layers)`` (GPT-2). The logical tensor is drawn whole on the CPU and cut
    for this tensor-parallel rank.
    """
    std = config.model.init_std
    residual_std = std / math.sqrt(2 * config.model.num_layers)

    @torch.no_grad()
    def fill(named: tuple[str, nn.Parameter]) -> None:
        name, parameter = named
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith(".bias"):
            parameter.zero_()
        else:
            scale = residual_std if name.endswith(("output.weight", "down.weight")) else std
            drawn = torch.empty(logical_shape(parameter, axis)).normal_(
                std=scale, generator=_generator(config.training.seed, name)
            )
            parameter.copy_(local_shard(drawn, parameter, axis))

    with ThreadPoolExecutor(DRAWN_AT_ONCE) as pool:
        list(pool.map(fill, module.named_parameters()))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
