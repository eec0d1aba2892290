"""Routers decide per token whether a layer runs.

All of them compare a score with a threshold in evaluation, so that no decision looks ahead. In training some
rank tokens against each other instead (``quantile``, ``topk``). Scores are fp32. Replicated over the tensor
axis, and so are their gradients: input and executed updates are the same on every tensor-parallel rank.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipmega.config import RoutingConfig
from skipmega.kernels.selection import kth_smallest
from skipmega.parallel.sequence import SequenceShards
from skipmega.routing.plan import group_capacity


class RouterInputs(NamedTuple):
    """What a layer's router is told beside the tokens."""

    threshold: Tensor  # [] float32, the score to exceed
    temperature: Tensor  # [] float32
    noise: Tensor | None  # [s, b] float32 logistic noise, added to the score


class Decision(NamedTuple):
    """A router's answer. ``probability`` carries the gradient; ``execute`` is what happens."""

    execute: Tensor  # [s, b] bool
    probability: Tensor  # [s, b] float32, of executing
    score: Tensor  # [s, b] float32, what evaluation compares with the threshold
    auxiliary: Tensor  # [] float32, the router's own losses (z-loss, stand-in), weighted

    def straight_through(self) -> Tensor:
        """[s, b] float32: 1 where executed, 0 where skipped, with the gradient of ``probability``."""
        return self.execute.float() + (self.probability - self.probability.detach())

    def entropy(self) -> Tensor:
        """[] float32: mean over tokens of the entropy of executing or not, in nats; no gradient."""
        p = self.probability.detach().clamp(1e-7, 1 - 1e-7)
        return -(p * p.log() + (1 - p) * (1 - p).log()).mean()


class Router(nn.Module):
    """The router of one layer; :class:`skipmega.config.RoutingConfig` tells the kinds and their sources.

    Parameters, by kind: ``weight`` [2, hidden] for gumbel (rows: skip, execute), [1, hidden] for the others
    that read the token; ``bias`` (the same number of entries) if ``router_bias`` and for ``fixed_input``;
    ``predictor`` for ``topk`` with ``stand_in: predictor``.
    """

    def __init__(self, routing: RoutingConfig, hidden_size: int) -> None:
        super().__init__()
        self.kind = routing.router
        self.quantile_from = routing.quantile_from
        self.group_size = routing.group_size
        self.centres_gradient = routing.centres_gradient
        self.z_loss_weight = routing.z_loss_weight
        self.stand_in_weight = routing.stand_in_weight
        rows = 2 if self.kind == "gumbel" else 1
        with_bias = routing.router_bias or self.kind == "fixed_input"
        reads = routing.scores_tokens
        self.weight = nn.Parameter(torch.empty(rows, hidden_size)) if reads else None
        self.bias = nn.Parameter(torch.empty(rows)) if with_bias else None
        predicts = self.kind == "topk" and routing.stand_in == "predictor"
        self.predictor = Predictor(hidden_size) if predicts else None

    @classmethod
    def parameter_count(cls, routing: RoutingConfig, hidden_size: int) -> int:
        """Number of parameters of one router."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in cls(routing, hidden_size).parameters())

    def forward(
        self, tokens: Tensor, inputs: RouterInputs, density: float, shards: SequenceShards | None = None
    ) -> Decision:
        """Decide for each token.

        Args:
            tokens: [s, b, hidden], what the router reads.
            inputs: threshold, temperature and noise.
            density: share to execute, for routers that rank tokens in training.
            shards: how sequences are cut, ``tokens`` being this rank's part; None if they are whole.
        """
        logits = self._logits(tokens)
        score = logits[..., -1] - logits[..., 0] if self.kind == "gumbel" else logits[..., 0]
        if self.centres_gradient and score.requires_grad:
            score = _centred(score, shards)
        compared = score if self.predictor is None else self.predictor(tokens.detach())
        if self.kind in ("gumbel", "sigmoid", "random", "fixed_input"):
            margin = score - inputs.threshold
            if inputs.noise is not None:
                margin = margin + inputs.noise
            margin = margin / inputs.temperature
            execute, probability = margin > 0, torch.sigmoid(margin)
        else:
            execute, probability = (
                self._rank(score, compared, inputs.threshold, density, shards),
                torch.sigmoid(score),
            )
        auxiliary = self._own_losses(logits, compared, execute)
        return Decision(execute, probability, compared.detach(), auxiliary)

    def _logits(self, tokens: Tensor) -> Tensor:
        """[s, b, 1 or 2] float32.

        Products with a vector, which compilers fuse with what made the tokens: as a matrix product they would
        have the tokens written and read once more, in fp32.
        """
        if self.weight is None:
            logits = tokens.new_zeros((*tokens.shape[:2], 1), dtype=torch.float32)
        else:
            rows = tokens.float().flatten(0, 1)
            logits = torch.stack([rows.mv(row) for row in self.weight.float().unbind()], dim=-1)
            logits = logits.view(*tokens.shape[:2], -1)
        return logits if self.bias is None else logits + self.bias.float()

    def _rank(
        self,
        score: Tensor,
        compared: Tensor,
        threshold: Tensor,
        density: float,
        shards: SequenceShards | None,
    ) -> Tensor:
        if self.kind == "never":
            return torch.zeros_like(score, dtype=torch.bool)
        if self.kind == "highway":
            return torch.ones_like(score, dtype=torch.bool)
        if self.training and self.kind == "topk":
            return best_of_groups(score.detach(), self.group_size or score.shape[0], density)
        if self.training and self.quantile_from == "batch":
            scores = score.detach()
            among = scores if shards is None else shards.whole(scores)
            return scores > share_threshold(among, density)
        return compared.detach() > threshold

    def _own_losses(self, logits: Tensor, compared: Tensor, execute: Tensor) -> Tensor:
        loss = logits.new_zeros(())
        if not self.training:
            return loss
        if self.z_loss_weight and self.weight is not None:
            both = logits if logits.shape[-1] == 2 else torch.cat([torch.zeros_like(logits), logits], dim=-1)
            loss = loss + self.z_loss_weight * torch.logsumexp(both, dim=-1).square().mean()
        if self.kind == "topk":
            cross_entropy = F.binary_cross_entropy_with_logits(compared, execute.float())
            loss = loss + self.stand_in_weight * cross_entropy
        return loss


def _centred(score: Tensor, shards: SequenceShards | None) -> Tensor:
    if shards is not None and not shards.are_one:
        return shards.without_mean_gradient(score)
    mean = score.mean()
    return score - (mean - mean.detach())


class Predictor(nn.Module):
    """Two layers that predict from the token alone whether it will be among the best of its group
    (Mixture-of-Depths, arXiv 2404.02258, section 3.5); reads without passing a gradient back."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        width = max(16, hidden_size // 4)
        self.up = nn.Parameter(torch.empty(width, hidden_size))
        self.down = nn.Parameter(torch.empty(1, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """[s, b, hidden] to [s, b] float32 logits."""
        inner = F.gelu(F.linear(tokens.float(), self.up.float()), approximate="tanh")
        return F.linear(inner, self.down.float()).squeeze(-1)


def best_of_groups(score: Tensor, group_size: int, density: float) -> Tensor:
    """Where a token is among the ``ceil(density * group_size)`` best of its group (more on ties).

    Args:
        score: [s, b] float32.
        group_size: consecutive tokens of one sequence that compete; divides s.
        density: share of each group.

    Returns:
        [s, b] bool.
    """
    length, batch = score.shape
    grouped = score.view(length // group_size, group_size, batch)
    worst = kth_smallest(grouped, group_size + 1 - group_capacity(1.0, density, group_size))
    return (grouped >= worst.unsqueeze(1)).view(length, batch)


def share_threshold(score: Tensor, share: float) -> Tensor:
    """The score that ``ceil(share * n)`` of the n scores exceed (fewer on ties): a [] tensor."""
    below = score.numel() - math.ceil(share * score.numel() - 1e-9)
    if below <= 0:
        return score.new_full((), -math.inf)
    return kth_smallest(score.reshape(1, -1, 1), below).view(())
