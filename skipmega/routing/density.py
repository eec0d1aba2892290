"""Keeping each layer's density at its target."""

from torch import Tensor


def squared_penalty(local: Tensor, mean: Tensor, target: float, weight: float) -> Tensor:
    """``weight * sum over layers of (density - target)^2`` (SkipLayer, arXiv 2311.15436, section 3).

    The density is that of the micro-batch over all data-parallel ranks. Value and gradient are exact
    although only the local share carries a gradient: data-parallel averaging of gradients completes it.

    Args:
        local: [layers] float32 densities of this rank's micro-batch, with the routers' gradient.
        mean: [layers] float32, ``local`` averaged over the data-parallel ranks, no gradient.
        target: wanted density.
        weight: factor.
    """
    error = mean - target
    return weight * (error.square() + 2 * error * (local - local.detach())).sum()
