"""Self-attention whose keys and values come from all tokens and whose queries may be packed."""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from skipmega.config import ModelConfig
from skipmega.kernels.attention import AttentionBackend, packed_attention
from skipmega.models.rotary import RotaryTable, rotary_table, rotate
from skipmega.parallel.grid import Axis
from skipmega.parallel.layers import ColumnLinear, RowLinear, enter_tensor_parallel


class Attention(nn.Module):
    """Multi-head or grouped-query attention with rotary positions; heads are cut over the tensor axis."""

    def __init__(self, model: ModelConfig, megatron: TransformerConfig, axis: Axis) -> None:
        super().__init__()
        self.axis = axis
        self.head_size = model.head_size
        self.theta = model.rope_theta
        heads, kv_heads = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
        self.query = ColumnLinear(model.hidden_size, heads, megatron, axis)
        self.key = ColumnLinear(model.hidden_size, kv_heads, megatron, axis)
        self.value = ColumnLinear(model.hidden_size, kv_heads, megatron, axis)
        self.output = RowLinear(heads, model.hidden_size, megatron, axis)

    def forward(
        self,
        tokens: Tensor,
        rotary: RotaryTable,
        positions: Tensor | None,
        queries: Tensor | None,
        query_positions: Tensor | None,
        since: Tensor | None,
        backend: AttentionBackend,
    ) -> Tensor:
        """Attend.

        Args:
            tokens: [s, b, hidden], normalised; make keys and values.
            rotary: of all positions of a sequence.
            positions: [s, b] int64 of ``tokens`` in their sequences, ascending; None for 0, 1, ...
            queries: [q, b, hidden], normalised, some of ``tokens``; None for all of them.
            query_positions: [q, b] int64, which of ``tokens`` the queries are, ascending.
            since: [b, s] int64 or None, see :func:`skipmega.kernels.attention.packed_attention`.
            backend: the implementation to use.

        Returns:
            [q, b, hidden].
        """
        shared = enter_tensor_parallel(tokens, self.axis)
        key = rotate(self._heads(self.key(shared)), rotary, positions)
        value = self._heads(self.value(shared))
        asked, at = shared, positions
        if queries is not None and query_positions is not None:
            asked, at = enter_tensor_parallel(queries, self.axis), query_positions
        query = rotate(self._heads(self.query(asked)), rotary, at)
        attended = packed_attention(query, key, value, query_positions, since, backend)
        return self.output(attended.flatten(2))

    def rotary_table(self, length: int, device: torch.device) -> RotaryTable:
        """The table :meth:`forward` needs for sequences of ``length`` tokens."""
        return rotary_table(length, self.head_size, self.theta, device)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:2], -1, self.head_size)
