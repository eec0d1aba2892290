"""Noise as a pure function of (seed, sample, layer, position).

The same sample gets the same noise on every grid, under recomputation and after a resume, and
different samples (so different data-parallel ranks) different noise; there is no generator to save.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


class NoiseKey(NamedTuple):
    """What the noise of a micro-batch is a function of, beside layer and position."""

    seed: int
    samples: Tensor  # [b] int64, number of each sequence in the run's data order


def uniform(key: NoiseKey, layers: Tensor, positions: Tensor) -> Tensor:
    """Independent uniform numbers, strictly inside (0, 1).

    Args:
        key: the run's seed and the sequences.
        layers: [n] int64, global numbers of layers.
        positions: [s] or [s, b] int64, of tokens in their sequences.

    Returns:
        [n, s, b] float32.
    """
    samples = key.samples
    of_layer = _mix((key.seed * 0x9E3779B1 & _MASK) + layers * 0x85EBCA77).view(-1, 1, 1)
    stream = _mix(_mix(samples >> 32) ^ of_layer)
    stream = _mix(stream ^ (samples & _MASK))
    at = positions.unsqueeze(1) if positions.ndim == 1 else positions
    bits = _mix(_mix(at ^ stream) + stream)
    return ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23


def logistic(key: NoiseKey, layers: Tensor, positions: Tensor) -> Tensor:
    """The difference of two independent Gumbel variables; arguments and shape as :func:`uniform`."""
    u = uniform(key, layers, positions)
    return u.log() - torch.log1p(-u)


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (Wellons' lowbias32) on int64 tensors that hold 32-bit words."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
