"""The feed-forward network."""

import torch.nn.functional as F
from torch import Tensor, nn

from skipmega.config import ModelConfig
from skipmega.parallel.layers import ColumnLinear, RowLinear
from skipmega.parallel.sequence import SequenceShards


class MLP(nn.Module):
    """GELU (tanh form) or SwiGLU (arXiv 2002.05202); the inner width is cut over the tensor axis."""

    def __init__(self, model: ModelConfig, shards: SequenceShards) -> None:
        super().__init__()
        self.shards = shards
        axis = shards.tensor
        self.up = ColumnLinear(model.hidden_size, model.ffn_size, axis)
        self.gate = (
            ColumnLinear(model.hidden_size, model.ffn_size, axis) if model.activation == "swiglu" else None
        )
        self.down = RowLinear(model.ffn_size, model.hidden_size, axis)

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, ..., hidden], this rank's rows, to the same shape."""
        shared = self.shards.enter(hidden)
        if self.gate is None:
            inner = F.gelu(self.up(shared), approximate="tanh")
        else:
            inner = F.silu(self.gate(shared)) * self.up(shared)
        return self.shards.leave(self.down(inner))
