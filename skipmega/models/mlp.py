"""The feed-forward network."""

import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from skipmega.config import ModelConfig
from skipmega.parallel.grid import Axis
from skipmega.parallel.layers import ColumnLinear, RowLinear, enter_tensor_parallel


class MLP(nn.Module):
    """GELU (tanh form) or SwiGLU (arXiv 2002.05202); the inner width is cut over the tensor axis."""

    def __init__(self, model: ModelConfig, megatron: TransformerConfig, axis: Axis) -> None:
        super().__init__()
        self.axis = axis
        self.up = ColumnLinear(model.hidden_size, model.ffn_size, megatron, axis)
        self.gate = (
            ColumnLinear(model.hidden_size, model.ffn_size, megatron, axis)
            if model.activation == "swiglu"
            else None
        )
        self.down = RowLinear(model.ffn_size, model.hidden_size, megatron, axis)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]."""
        shared = enter_tensor_parallel(hidden, self.axis)
        if self.gate is None:
            return self.down(F.gelu(self.up(shared), approximate="tanh"))
        return self.down(F.silu(self.gate(shared)) * self.up(shared))
