"""Mixture-of-Depths (arXiv 2404.02258) in plain PyTorch: the best of each sequence, among themselves."""

import math

from torch import Tensor, nn

from skipmega.config import ModelConfig
from skipmega.experiments.speed.peers.plain import PlainLayer


class MixtureOfDepths(nn.Module):
    """The ``density`` share of best scores attend each other and are updated, times the sigmoid of the score;
    the others are left as they are."""

    def __init__(self, model: ModelConfig, length: int, density: float) -> None:
        super().__init__()
        self.layer = PlainLayer(model, length)
        self.score = nn.Linear(model.hidden_size, 1, bias=False)
        self.density = density

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, hidden] to the same shape."""
        score = self.score(hidden).squeeze(-1)
        count = math.ceil(self.density * hidden.shape[1])
        best = score.topk(count, dim=1).indices.sort(dim=1).values
        rows = best.unsqueeze(-1).expand(-1, -1, hidden.shape[2])
        weight = score.gather(1, best).sigmoid().unsqueeze(-1)
        update = self.layer.update(hidden.gather(1, rows), best) * weight
        return hidden.scatter_add(1, rows, update)
