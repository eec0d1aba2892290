"""Counting what a model read, and which layers ran for it, without waiting for the device."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Work:
    """What a model did since it was last asked.

    ``tokens`` were read, padding left out; ``executed``, by layer, is how many of them ran that layer, or the
    half of it that may be skipped. Without entries, layers were not counted.
    """

    tokens: int = 0
    executed: list[int] = field(default_factory=list)
    _on_device: Tensor | None = None

    def add(self, counts: Sequence[int], executed: Tensor | None) -> None:
        """Count a pass.

        Args:
            counts: how many tokens of each of the b rows are no padding; the first ones.
            executed: bool [layers, b, n], who ran; None where that is not known.
        """
        self.tokens += sum(counts)
        if executed is None:
            return
        places = torch.arange(executed.shape[2], device=executed.device)
        real = places < torch.tensor(counts, device=executed.device).unsqueeze(1)
        ran = (executed & real).sum(dim=(1, 2))
        self._on_device = ran if self._on_device is None else self._on_device + ran

    def on_host(self, group: dist.ProcessGroup | None = None) -> "Work":
        """The same as plain numbers; waits for the device. ``group``: of pipeline stages, whose layers are
        added up."""
        if self._on_device is None:
            return Work(self.tokens)
        if group is not None:
            dist.all_reduce(self._on_device, group=group)
        return Work(self.tokens, self._on_device.tolist())
