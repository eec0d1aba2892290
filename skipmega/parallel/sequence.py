"""How the tokens of a sequence are cut over processes, and the moves between the cuts.

Over C context-parallel ranks a sequence is cut into 2C chunks, of which rank c holds the c-th and the c-th
from the end: under a causal mask all have the same to attend. With sequence parallelism the rows so held are
cut once more, into equal contiguous parts over the tensor-parallel ranks, wherever a layer works row by row.
Positions ascend along the rows of a rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipmega.parallel import collectives
from skipmega.parallel.grid import Axis, ParallelGrid


@dataclass(frozen=True)
class SequenceShards:
    """The cut as one process sees it, of any length that it cuts equally.

    ``both`` are all ranks that share a sequence: ``context``, and ``tensor`` if ``over_tensor``; ``tokens``
    are all that hold different tokens, data-parallel ones included.
    """

    tensor: Axis
    context: Axis
    both: Axis
    tokens: Axis
    over_tensor: bool

    @classmethod
    def of(cls, grid: ParallelGrid) -> "SequenceShards":
        """The cut that a grid makes."""
        return cls(grid.tensor, grid.context, grid.shards, grid.tokens, grid.sequence_parallel)

    @property
    def are_one(self) -> bool:
        """Whether every process holds whole sequences."""
        return self.both.size == 1

    @property
    def summed(self) -> int:
        """Ranks over whose tokens the gradients of replicated parameters are summed, not averaged."""
        return self.tensor.size if self.over_tensor else 1

    def positions(self, length: int, device: torch.device) -> Tensor:
        """[length / both] int64: positions of this rank's rows."""
        context = self.context_positions(length, device)
        return context.chunk(self.tensor.size)[self.tensor.rank] if self.over_tensor else context

    def context_positions(self, length: int, device: torch.device) -> Tensor:
        """[length / context] int64: positions of the rows that :meth:`enter` leaves this rank with."""
        whole = torch.arange(length, device=device)
        if self.context.size == 1:
            return whole
        chunks = whole.chunk(2 * self.context.size)
        return torch.cat([chunks[self.context.rank], chunks[-1 - self.context.rank]])

    def take(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's rows of a tensor that has all of them along ``dim``."""
        return whole if self.are_one else self._select(whole, dim, self.positions)

    def take_context(self, whole: Tensor, dim: int) -> Tensor:
        """The rows at :meth:`context_positions` of a tensor that has all of them along ``dim``."""
        return whole if self.context.size == 1 else self._select(whole, dim, self.context_positions)

    def enter(self, rows: Tensor) -> Tensor:
        """Before a matrix cut over the tensor axis: its ranks' rows together.

        Backward sums the ranks' gradients and leaves each those of its own rows.

        Args:
            rows: [n, ...], as many on every rank.

        Returns:
            [n * tensor ranks, ...], or ``rows`` where they are not cut over the tensor axis.
        """
        if self.tensor.size == 1:
            return rows
        if not self.over_tensor:
            return collectives.copy(rows, self.tensor)
        return collectives.gather(rows, self.tensor)

    def leave(self, partial: Tensor) -> Tensor:
        """After a matrix cut over the tensor axis: the ranks' results summed, to each those of its own rows.

        Args:
            partial: [n * tensor ranks, ...], or [n, ...] where rows are not cut over the tensor axis.

        Returns:
            [n, ...].
        """
        if self.tensor.size == 1:
            return partial
        if not self.over_tensor:
            return collectives.sum_over(partial, self.tensor)
        return collectives.scatter_sums(partial, self.tensor)

    def gather_context(self, rows: Tensor) -> Tensor:
        """All rows of the sequence, in order, from those of each context rank; gradients are summed.

        Args:
            rows: [length / context, ...].
        """
        if self.context.size == 1:
            return rows
        return self._in_order(collectives.gather(rows, self.context))

    @torch.no_grad()
    def whole(self, rows: Tensor, dim: int = 0) -> Tensor:
        """All rows of the sequence along ``dim``, in order, without gradient, on every rank that shares it.

        Args:
            rows: length / both of them along ``dim``.
        """
        if self.are_one:
            return rows
        return self._in_order(collectives.gather_rows_of_ranks(rows.movedim(dim, 0), self.both)).movedim(
            0, dim
        )

    @torch.no_grad()
    def over_tensor_ranks(self, rows: Tensor) -> Tensor:
        """As :meth:`enter`, without a gradient."""
        return collectives.gather_rows_of_ranks(rows, self.tensor) if self.over_tensor else rows

    def without_mean_gradient(self, values: Tensor) -> Tensor:
        """``values`` unchanged; of their gradient its mean, over all ranks that share the sequences, is
        taken out."""
        centred: Tensor = _WithoutMeanGradient.apply(values, self.both)
        return centred

    def _select(self, whole: Tensor, dim: int, positions: Callable[[int, torch.device], Tensor]) -> Tensor:
        return whole.index_select(dim, positions(whole.shape[dim], whole.device))

    def _in_order(self, gathered: Tensor) -> Tensor:
        """From the order of ranks to that of positions."""
        if self.context.size == 1:
            return gathered
        chunks = gathered.unflatten(0, (self.context.size, 2, -1))
        return torch.cat([chunks[:, 0].flatten(0, 1), chunks[:, 1].flip(0).flatten(0, 1)])


class _WithoutMeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad - ctx.axis.mean(grad.mean()), None
