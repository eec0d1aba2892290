"""Keys and values that stay between forward passes, so that a text is read on without being read again."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ROOM = 64  # slots are added so many at a time


class LayerCache:
    """Keys and values of one layer; a token's slot is its position.

    ``held`` are both, [slots, b, kv_heads, d]; nothing at first. Rows may differ in length. What padding
    leaves beyond a row's end is seen by no query of the row until the token that belongs there has
    overwritten it.
    """

    def __init__(self) -> None:
        self.held: list[Tensor] = []

    def extend(
        self, key: Tensor, value: Tensor, positions: Tensor | None, slots: int
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values [n, b, kv_heads, d].

        Args:
            positions: [n, b] int64, below ``slots``; None for 0, 1, ... of an empty cache.
            slots: to hold after this; no fewer than before.

        Returns:
            What there was and they, [slots, b, kv_heads, d]; of an empty cache they alone.
        """
        if positions is None:
            self.held = [_with_room(key, slots), _with_room(value, slots)]
            return key, value
        rows = torch.arange(key.shape[1], device=key.device)
        self.held = [_with_room(held, slots) for held in self.held]
        for held, new in zip(self.held, (key, value), strict=True):
            held[positions, rows] = new
        key, value = self.held
        return key, value

    def take(self, rows: Tensor) -> "LayerCache":
        """A copy of the ``rows`` [m] int64 of the batch, any number of times each."""
        taken = LayerCache()
        taken.held = [part.index_select(1, rows) for part in self.held]
        return taken


class KeyValueCache:
    """What the layers of one pipeline stage keep of a batch of texts, of ``lengths`` tokens."""

    def __init__(self, layers: Mapping[str, LayerCache], lengths: Sequence[int], slots: int = 0) -> None:
        self.layers = layers
        self.lengths = list(lengths)
        self.slots = slots

    def make_room(self, longest: int) -> None:
        """Have the layers hold ``longest`` tokens a text, or more, when they are next extended."""
        self.slots = max(self.slots, ROOM * -(-longest // ROOM))

    def take(self, rows: Sequence[int]) -> "KeyValueCache":
        """A copy of these rows of the batch, any number of times each."""
        held = (part.device for layer in self.layers.values() for part in layer.held)
        index = torch.tensor(list(rows), dtype=torch.int64, device=next(held, None))
        layers = {name: layer.take(index) for name, layer in self.layers.items()}
        return KeyValueCache(layers, [self.lengths[row] for row in rows], self.slots)


def _with_room(held: Tensor, slots: int) -> Tensor:
    if held.shape[0] >= slots:
        return held
    longer = held.new_zeros((slots, *held.shape[1:]))
    longer[: held.shape[0]] = held
    return longer
