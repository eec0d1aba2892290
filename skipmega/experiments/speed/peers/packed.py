"""The straightforward packed SkipLayer: row indices, FlexAttention, index_put, for one torch.compile."""

import math

import torch
from torch import Tensor, nn

from skipmega.config import ModelConfig
from skipmega.experiments.speed.peers.plain import PlainLayer
from skipmega.kernels.attention import AttentionBackend, packed_attention


class Packed(nn.Module):
    """Keys and values of all tokens; the ``density`` share of best scores asks, and is updated, times the
    sigmoid of the score."""

    def __init__(
        self, model: ModelConfig, length: int, density: float, attention: AttentionBackend = "sdpa"
    ) -> None:
        super().__init__()
        self.layer = PlainLayer(model, length)
        self.score = nn.Linear(model.hidden_size, 1, bias=False)
        self.density = density
        self.attention: AttentionBackend = attention

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, hidden] to the same shape."""
        layer, (batch, length, _) = self.layer, hidden.shape
        normed = layer.attention_norm(hidden)
        score = self.score(normed).squeeze(-1)
        best = score.topk(math.ceil(self.density * length), dim=1).indices.sort(dim=1).values
        sequence = torch.arange(batch, device=hidden.device).unsqueeze(1)
        query = layer.rotated(layer.query(normed[sequence, best]), best)
        key, value = layer.rotated(layer.key(normed), None), layer.heads(layer.value(normed))
        query, key, value = (heads.permute(2, 0, 1, 3) for heads in (query, key, value))
        mixed = packed_attention(query, key, value, best.t(), None, self.attention)
        attended = layer.output(mixed.transpose(0, 1).flatten(2))
        update = attended + layer.feed_forward(hidden[sequence, best] + attended)
        weighted = update * score.gather(1, best).sigmoid().unsqueeze(-1)
        return hidden.index_put((sequence, best), weighted, accumulate=True)
