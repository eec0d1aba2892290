"""Self-attention whose keys and values come from all tokens and whose queries may be packed."""

import torch
from torch import Tensor, nn

from skipmega.config import ModelConfig
from skipmega.kernels.attention import AttentionBackend, packed_attention
from skipmega.kernels.rows import gather_rows
from skipmega.models.recompute import run_again
from skipmega.models.rotary import RotaryTable, rotary_table, rotate
from skipmega.parallel.layers import ColumnLinear, RowLinear
from skipmega.parallel.sequence import SequenceShards
from skipmega.routing.plan import PackingPlan


class Attention(nn.Module):
    """Multi-head or grouped-query attention with rotary positions; heads are cut over the tensor axis.

    ``packs_again`` packs the tokens that ask again in backward.
    """

    def __init__(self, model: ModelConfig, shards: SequenceShards, packs_again: bool = False) -> None:
        super().__init__()
        self.packs_again = packs_again
        self.shards = shards
        self.head_size = model.head_size
        self.theta = model.rope_theta
        heads, kv_heads = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
        self.query = ColumnLinear(model.hidden_size, heads, shards.tensor)
        self.key = ColumnLinear(model.hidden_size, kv_heads, shards.tensor)
        self.value = ColumnLinear(model.hidden_size, kv_heads, shards.tensor)
        self.output = RowLinear(heads, model.hidden_size, shards.tensor)

    def forward(
        self,
        tokens: Tensor,
        rotary: RotaryTable,
        positions: Tensor | None,
        asking: PackingPlan | None,
        since: Tensor | None,
        backend: AttentionBackend,
    ) -> Tensor:
        """Attend.

        Below, n rows of a sequence are those that :meth:`SequenceShards.enter` leaves this rank with.

        Args:
            tokens: [rows of this rank, b, hidden], normalised; make keys and values.
            rotary: of all positions of a sequence.
            positions: [n, b] or [n, 1] int64 of the rows in their sequences, ascending; None for 0, 1, ...
            asking: which of the n rows ask; None for all of them.
            since: [b, s] int64 or None, see :func:`skipmega.kernels.attention.packed_attention`; counted as
                keys are, that is in positions where the keys are those of all tokens.
            backend: the implementation to use.

        Returns:
            [rows of this rank that ask, b, hidden].
        """
        shared = self.shards.enter(tokens)
        key = rotate(self.split(self.key(shared)), rotary, positions)
        value = self.split(self.value(shared))
        asked, at, keys_at = shared, positions, None
        if positions is not None and self.shards.context.size > 1:
            keys_at = positions.expand(-1, tokens.shape[1])
        if asking is not None:
            rows = (shared.flatten(0, 1), asking.rows, asking.slots)
            packed = run_again(gather_rows, *rows, when=self.packs_again and self.training)
            asked = packed.view(-1, *shared.shape[1:])
            at = keys_at = asking.positions if keys_at is None else keys_at.gather(0, asking.positions)
        query = rotate(self.split(self.query(asked)), rotary, at)
        key, value = self.shards.gather_context(key), self.shards.gather_context(value)
        attended = packed_attention(query, key, value, keys_at, since, backend)
        return self.shards.leave(self.output(attended.flatten(2)))

    def rotary_table(self, length: int, device: torch.device) -> RotaryTable:
        """The table :meth:`forward` needs for sequences of ``length`` tokens."""
        return rotary_table(length, self.head_size, self.theta, device)

    def split(self, projected: Tensor) -> Tensor:
        """[n, b, heads * d] to [n, b, heads, d]."""
        return projected.view(*projected.shape[:2], -1, self.head_size)
