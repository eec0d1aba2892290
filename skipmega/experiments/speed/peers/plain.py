"""A Llama layer in plain PyTorch, whose queries may be some of the tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipmega.config import ModelConfig


class PlainLayer(nn.Module):
    """Pre-norm rotary attention and feed-forward network, [b, s, hidden] throughout.

    Args:
        model: the shape.
        length: the longest sequence.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, model: ModelConfig, length: int) -> None:
        super().__init__()
        hidden, ffn = model.hidden_size, model.ffn_size
        self.head_size = model.head_size
        kv_width = model.kv_heads * model.head_size
        width = model.num_attention_heads * model.head_size
        self.attention_norm = nn.RMSNorm(hidden, model.norm_epsilon)
        self.mlp_norm = nn.RMSNorm(hidden, model.norm_epsilon)
        self.query = nn.Linear(hidden, width, bias=False)
        self.key = nn.Linear(hidden, kv_width, bias=False)
        self.value = nn.Linear(hidden, kv_width, bias=False)
        self.output = nn.Linear(width, hidden, bias=False)
        self.gate = nn.Linear(hidden, ffn, bias=False) if model.activation == "swiglu" else None
        self.up = nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)
        half = model.head_size // 2
        frequency = model.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(length).unsqueeze(1) * frequency
        self.register_buffer("cosine", angle.cos().float())
        self.register_buffer("sine", angle.sin().float())

    def forward(self, hidden: Tensor) -> Tensor:
        """All tokens, causally."""
        return hidden + self.update(hidden)

    def update(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """What the layer adds to rows that see each other causally.

        Args:
            hidden: [b, n, hidden].
            positions: [b, n] int64, ascending; None for 0, 1, ...
        """
        attended = self.attend(hidden, positions)
        return attended + self.feed_forward(hidden + attended)

    def attend(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """The attention half of :meth:`update`."""
        normed = self.attention_norm(hidden)
        query = self.rotated(self.query(normed), positions)
        key = self.rotated(self.key(normed), positions)
        value = self.heads(self.value(normed))
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )
        return self.output(mixed.transpose(1, 2).flatten(2))

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """The feed-forward half: normalise and run."""
        normed = self.mlp_norm(hidden)
        if self.gate is None:
            return self.down(F.gelu(self.up(normed), approximate="tanh"))
        return self.down(F.silu(self.gate(normed)) * self.up(normed))

    def heads(self, projected: Tensor) -> Tensor:
        """[b, n, heads * d] to [b, heads, n, d]."""
        return projected.unflatten(2, (-1, self.head_size)).transpose(1, 2)

    def rotated(self, projected: Tensor, positions: Tensor | None) -> Tensor:
        """Heads turned by their positions: [b, n, heads * d] to [b, heads, n, d]."""
        heads = self.heads(projected)
        rows = slice(heads.shape[2]) if positions is None else positions
        cosine, sine = self.cosine[rows], self.sine[rows]
        if positions is not None:
            cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
        first, second = heads.chunk(2, dim=-1)
        turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
        return turned.to(heads.dtype)
