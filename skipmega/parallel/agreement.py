"""Decisions of all processes together, apart from the collectives of training."""

import torch
import torch.distributed as dist


class Agreement:
    """What the processes of a job decide together, on the CPU, so that no device has to be waited for.

    Making one is collective, as are its methods.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")

    def greatest(self, *values: int) -> list[int]:
        """The greatest of each value over all processes."""
        together = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(together, op=dist.ReduceOp.MAX, group=self._group)
        return together.tolist()
