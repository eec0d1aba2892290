"""The feed-forward network."""

import torch.nn.functional as F
from torch import Tensor, nn

from skipmega.config import ModelConfig
from skipmega.models.recompute import run_again
from skipmega.parallel.layers import ColumnLinear, RowLinear
from skipmega.parallel.sequence import SequenceShards


class MLP(nn.Module):
    """GELU (tanh form) or SwiGLU (arXiv 2002.05202); the inner width is cut over the tensor axis.

    ``activates_again`` runs the activation again in backward.
    """

    def __init__(self, model: ModelConfig, shards: SequenceShards, activates_again: bool = False) -> None:
        super().__init__()
        self.activates_again = activates_again
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
        made = (self.up(shared),) if self.gate is None else (self.gate(shared), self.up(shared))
        activation = _gelu if self.gate is None else _swiglu
        inner = run_again(activation, *made, when=self.activates_again and self.training)
        return self.shards.leave(self.down(inner))


def _gelu(up: Tensor) -> Tensor:
    return F.gelu(up, approximate="tanh")


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up
