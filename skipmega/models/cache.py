"""Keys and values that stay between forward passes, so that a text is read on without being read again."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ROOM = 64  # slots are added so many at a time


class LayerCache:
    """Keys and values of one layer; a token's slot is its position.

    Rows may differ in length. What padding leaves beyond a row's end is seen by no query of the row until the
    token that belongs there has overwritten it.
    """

    def __init__(self) -> None:
        self._held: list[Tensor] = []

    def extend(self, key: Tensor, value: Tensor, positions: Tensor | None, end: int) -> tuple[Tensor, Tensor]:
        """Add keys and values [n, b, kv_heads, d]; returns those of slots 0 to ``end``.

        Args:
            positions: [n, b] int64, below ``end``; None for 0, 1, ... of an empty cache.
            end: slots in use after this.
        """
        if positions is None:
            self._held = [key, value]
            return key, value
        rows = torch.arange(key.shape[1], device=key.device)
        for part, (held, new) in enumerate(zip(self._held, (key, value), strict=True)):
            if end > held.shape[0]:
                slots = ROOM * -(-end // ROOM)
                self._held[part] = new.new_zeros((slots, *new.shape[1:]))
                self._held[part][: held.shape[0]] = held
            self._held[part][positions, rows] = new
        key, value = self._held
        return key[:end], value[:end]

    def take(self, rows: Sequence[int]) -> "LayerCache":
        """A copy of these rows of the batch, any number of times each."""
        taken = LayerCache()
        for part in self._held:
            index = torch.tensor(list(rows), dtype=torch.int64, device=part.device)
            taken._held.append(part.index_select(1, index))
        return taken


class KeyValueCache:
    """What the layers of one pipeline stage keep of a batch of texts, of ``lengths`` tokens."""

    def __init__(self, layers: Mapping[str, LayerCache], lengths: Sequence[int]) -> None:
        self.layers = layers
        self.lengths = list(lengths)

    def take(self, rows: Sequence[int]) -> "KeyValueCache":
        """A copy of these rows of the batch, any number of times each."""
        layers = {name: layer.take(rows) for name, layer in self.layers.items()}
        return KeyValueCache(layers, [self.lengths[row] for row in rows])
