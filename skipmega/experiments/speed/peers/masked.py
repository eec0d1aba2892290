"""Skipping as public code does it: every token is computed, then a mask decides."""

from torch import Tensor, nn

from skipmega.config import ModelConfig
from skipmega.experiments.speed.peers.plain import PlainLayer


class Masked(nn.Module):
    """Updates of tokens whose score is positive count, with a straight-through gradient of its sigmoid."""

    def __init__(self, model: ModelConfig, length: int) -> None:
        super().__init__()
        self.layer = PlainLayer(model, length)
        self.score = nn.Linear(model.hidden_size, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, hidden] to the same shape."""
        probability = self.score(hidden).sigmoid()
        keep = (probability > 0.5).to(hidden.dtype) + probability - probability.detach()
        return hidden + keep * self.layer.update(hidden)
