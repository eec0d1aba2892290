"""Rotary positions in the half-split layout (arXiv 2104.09864): channel i turns with channel i + d/2."""

import torch
from torch import Tensor


def rotate(heads: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Turn each head by its token's position, angles in fp32.

    Args:
        heads: [n, b, heads, d], any float dtype.
        positions: [n, b] or [n, 1] int64.
        theta: base of the geometric series of wavelengths.

    Returns:
        Shape and dtype of ``heads``.
    """
    half = heads.shape[-1] // 2
    exponent = torch.arange(half, device=heads.device, dtype=torch.float32) / half
    angles = positions.unsqueeze(-1).float() * theta**-exponent
    cosine, sine = angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)
    first, second = heads.float().chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.to(heads.dtype)
