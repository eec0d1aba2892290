"""Routers decide per token whether a layer runs."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Decision(NamedTuple):
    """A router's answer. ``probability`` carries the gradient; ``execute`` is what happens."""

    execute: Tensor  # [s, b] bool
    probability: Tensor  # [s, b] float32, of executing

    def straight_through(self) -> Tensor:
        """[s, b] float32: 1 where executed, 0 where skipped, with the gradient of ``probability``."""
        return self.execute.float() + self.probability - self.probability.detach()


class GumbelRouter(nn.Module):
    """Straight-through Gumbel-Softmax over [skip, execute] (SkipLayer, arXiv 2311.15436, section 3).

    Logits are ``W . normed(x)``, no bias, in fp32. Training samples with Gumbel noise at ``temperature``;
    evaluation takes the larger logit. Replicated over the tensor axis, and so is its gradient: input and
    executed updates are the same on every tensor-parallel rank.
    """

    def __init__(self, hidden_size: int, temperature: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, hidden_size))
        self.temperature = temperature

    def forward(self, normed: Tensor, noise: Tensor | None) -> Decision:
        """Decide for each token.

        Args:
            normed: [s, b, hidden], the layer-normalised input.
            noise: [s, b] float32 logistic noise; None decides greedily.
        """
        skip, execute = torch.nn.functional.linear(normed.float(), self.weight.float()).unbind(-1)
        margin = execute - skip
        if noise is not None:
            margin = (margin + noise) / self.temperature
        return Decision(execute=margin > 0, probability=torch.sigmoid(margin))
