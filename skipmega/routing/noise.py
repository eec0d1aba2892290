"""Noise as a pure function of (seed, sample, layer, position).

The same sample gets the same noise on every grid, under recomputation and after a resume, and
different samples (so different data-parallel ranks) different noise; there is no generator to save.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def uniform(seed: int, samples: Tensor, layer: int, length: int) -> Tensor:
    """Independent uniform numbers, strictly inside (0, 1).

    Args:
        seed: the run's seed.
        samples: [b] int64, number of each sequence in the run's data order.
        layer: global number of the layer.
        length: tokens of a sequence.

    Returns:
        [length, b] float32.
    """
    high = _mix(samples >> 32) ^ ((seed * 0x9E3779B1 + layer * 0x85EBCA77) & _MASK)
    stream = _mix(_mix(high) ^ (samples & _MASK))
    position = torch.arange(length, device=samples.device).unsqueeze(1)
    bits = _mix(_mix(position ^ stream) + stream & _MASK)
    return ((bits >> 8).to(torch.float32) + 0.5) * 2.0**-24


def logistic(seed: int, samples: Tensor, layer: int, length: int) -> Tensor:
    """The difference of two independent Gumbel variables; arguments and shape as :func:`uniform`."""
    u = uniform(seed, samples, layer, length)
    return u.log() - torch.log1p(-u)


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (Wellons' lowbias32) on int64 tensors that hold 32-bit words."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
