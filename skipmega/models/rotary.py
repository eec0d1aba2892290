"""Rotary positions in the half-split layout (arXiv 2104.09864): channel i turns with channel i + d/2."""

from typing import NamedTuple

import torch
from torch import Tensor


class RotaryTable(NamedTuple):
    """Cosines and sines of the angles of positions 0, 1, ...: each [length, d / 2] float32."""

    cosine: Tensor
    sine: Tensor


def rotary_table(length: int, size: int, theta: float, device: torch.device) -> RotaryTable:
    """The table of ``length`` positions for heads of ``size`` channels.

    Made once per forward pass and read by every layer: computed where it is used, the angles cost more than
    the rotation (measured: H200, half of a compiled projection's epilogue).
    """
    half = size // 2
    exponent = torch.arange(half, device=device, dtype=torch.float32) / half
    angles = torch.arange(length, device=device, dtype=torch.float32).unsqueeze(1) * theta**-exponent
    return RotaryTable(angles.cos(), angles.sin())


def rotate(heads: Tensor, table: RotaryTable, positions: Tensor | None = None) -> Tensor:
    """Turn each head by its token's position, in fp32.

    Args:
        heads: [n, b, heads, d], any float dtype.
        table: of at least as many positions as are needed.
        positions: [n, b] or [n, 1] int64; None for 0, 1, ..., n - 1 in every sequence.

    Returns:
        Shape and dtype of ``heads``.
    """
    cosine, sine = (
        part[: heads.shape[0]].unsqueeze(1) if positions is None else part[positions] for part in table
    )
    cosine, sine = cosine.unsqueeze(2), sine.unsqueeze(2)
    first, second = heads.float().chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.to(heads.dtype)
