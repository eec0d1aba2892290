"""Keeping each layer's density at its target: the losses of a micro-batch, and what a step's end moves.

Controllers act on means over all micro-batches and ranks of a step, so that every rank agrees.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from skipmega.routing.state import LEVELS, RoutingState, tracking_gains

Mean = Callable[[Tensor], Tensor]


class DensityController:
    """Penalises and observes micro-batches, and updates a :class:`RoutingState` once per step.

    Args:
        state: of this stage's routed layers; moved in place.
        mean_over_tokens: averages a tensor over the ranks that hold different tokens, detached.
    """

    def __init__(self, state: RoutingState, mean_over_tokens: Mean) -> None:
        self.state = state
        self._mean = mean_over_tokens
        self.forget_step()

    def penalty(self, densities: Tensor, step: int) -> Tensor:
        """The density loss of a micro-batch, to be averaged over micro-batches and ranks.

        Args:
            densities: [layers] float32, shares of this rank's tokens chosen, with the routers' gradient.
            step: 0-based.
        """
        routing = self.state.config.routing
        if routing.control == "penalty":
            mean = self._mean(densities)
            return squared_penalty(densities, mean, self.state.wanted(step), routing.density_loss_weight)
        if routing.control == "coefficient":
            return (self.state.coefficient * densities).sum()
        return densities.new_zeros(())

    @torch.no_grad()
    def observe(self, densities: Tensor, scores: Tensor) -> None:
        """Count one micro-batch.

        Args:
            densities: [layers] float32.
            scores: [layers, s, b] float32, of whole sequences.
        """
        self._micro_batches += 1
        self._density += densities.detach()
        routing = self.state.config.routing
        if routing.scores_tokens or routing.router == "fixed_input":
            ordered = scores.flatten(1).sort(dim=1).values
            at = torch.linspace(0, ordered.shape[1] - 1, LEVELS, device=ordered.device).round().long()
            self._quantiles += ordered[:, at]

    @torch.no_grad()
    def end_step(self, step: int) -> None:
        """Move the state by what optimizer step ``step`` (0-based) saw; all ranks of a stage call it."""
        state, routing = self.state, self.state.config.routing
        if not state.layers:
            return
        seen = torch.cat([self._density.unsqueeze(1), self._quantiles], dim=1) / self._micro_batches
        seen = self._mean(seen)
        density, quantiles = seen[:, 0], seen[:, 1:]
        error = density - state.wanted(step)
        if routing.control == "coefficient":
            state.coefficient += routing.coefficient_rate * error * (error.abs() > routing.dead_band)
        margins = quantiles - state.threshold.unsqueeze(1)
        expected = state.margins + state.trend
        of_level, of_trend = tracking_gains(step, routing.running_rate)
        state.margins.copy_(expected + of_level * (margins - expected))
        state.trend += of_trend * (margins - expected)
        if routing.control == "bias":
            state.threshold += routing.bias_rate * error * state.spread()
        self.forget_step()

    def forget_step(self) -> None:
        """What the step saw so far moves nothing: its update was discarded, say."""
        self._micro_batches = 0
        self._density = torch.zeros_like(self.state.threshold)
        self._quantiles = torch.zeros_like(self.state.margins)


def squared_penalty(local: Tensor, mean: Tensor, target: Tensor, weight: float) -> Tensor:
    """``weight * sum over layers of (density - target)^2`` (SkipLayer, arXiv 2311.15436, section 3).

    The density is that of the micro-batch over all ranks that hold its tokens. Value and gradient are exact
    although only the local share carries a gradient: averaging gradients over the ranks completes it.

    Args:
        local: [layers] float32 densities of this rank's tokens, with the routers' gradient.
        mean: [layers] float32, ``local`` averaged over the ranks, no gradient.
        target: [layers] float32, wanted densities.
        weight: factor.
    """
    error = mean - target
    return weight * (error.square() + 2 * error * (local - local.detach())).sum()
