"""Adafactor over ZeRO's flat partitions and tensor-parallel shards.

ZeRO hands an optimizer flat pieces of flattened parameters; a factored second moment needs rows and
columns of the whole matrix. With one parameter per group each piece is a known range of one (local)
matrix, so row and column sums are partial sums that two collectives complete, whatever the grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from skipmega.parallel.grid import Axis, ParallelGrid

_SMALLEST_SQUARE = 1e-30  # epsilon_1 of the paper
_SMALLEST_SCALE = 1e-3  # epsilon_2 of the paper


@dataclass(frozen=True)
class ShardLayout:
    """What part of which matrix a group's flat partition holds.

    ``shape`` is the tensor-parallel rank's local shape; ``partition_dim`` the dimension cut over the
    tensor axis (None: replicated); ``name`` the parameter's logical name.
    """

    name: str
    shape: tuple[int, ...]
    partition_dim: int | None

    @property
    def is_factored(self) -> bool:
        """Matrices keep row and column moments, vectors a full one."""
        return len(self.shape) == 2

    @property
    def numel(self) -> int:
        """Elements of the local tensor."""
        return int(torch.Size(self.shape).numel())


class ShardedAdafactor(torch.optim.Optimizer):
    """Adafactor without first moment, with a fixed decay (arXiv 1804.04235, algorithm 4; SkipLayer's
    settings: beta1 = 0, beta2 = 0.99, update-RMS clipping at 1, relative to the parameter's RMS).

    Args:
        groups: one parameter each, with a :class:`ShardLayout` under the key ``layout``.
        grid: completes the sums over data ranks (ZeRO partitions) and tensor ranks (shards).
        lr: relative step size; the absolute one is ``lr * max(1e-3, RMS(parameter))``.
        beta2: decay of the second moment, bias-corrected.
        update_clip: updates with a larger RMS are scaled down to it.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        grid: ParallelGrid,
        *,
        lr: float,
        beta2: float,
        update_clip: float,
        weight_decay: float,
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self._grid = grid
        self._beta2 = beta2
        self._clip = update_clip
        self.updates = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; every rank of the grid calls it together."""
        self.updates += 1
        work = [(group, piece) for group in self.param_groups for piece in self._pieces(group)]
        self._accumulate_moments(work)
        directions = [self._direction(group, piece) for group, piece in work]
        sums = self._square_sums([(group, piece.data, d) for (group, piece), d in zip(work, directions, strict=True)])
        for (group, piece), direction, (weight_square, update_square) in zip(
            work, directions, sums, strict=True
        ):
            numel = self._logical_numel(group["layout"])
            scale = max(_SMALLEST_SCALE, (weight_square / numel) ** 0.5)
            clip = max(1.0, (update_square / numel) ** 0.5 / self._clip)
            rate = group["lr"]
            piece.mul_(1 - rate * group["weight_decay"])
            piece.add_(direction, alpha=-rate * scale / clip)

    def create_moments(self) -> None:
        """Make the moments that the first step would make, as zeros (to be filled from a checkpoint)."""
        for group in self.param_groups:
            layout, (piece,) = group["layout"], group["params"]
            if layout.is_factored:
                height, width = layout.shape
                self.state[piece] = {
                    "row": torch.zeros(height, device=piece.device),
                    "column": torch.zeros(width, device=piece.device),
                }
            else:
                self.state[piece] = {"full": torch.zeros_like(piece)}

    def _pieces(self, group: dict[str, Any]) -> Iterator[Tensor]:
        (piece,) = group["params"]
        if piece.grad is not None:
            yield piece

    def _range(self, layout: ShardLayout, piece: Tensor) -> tuple[int, int]:
        """Half-open range of the local flattened parameter that this data rank's piece holds."""
        if piece.shape == layout.shape:
            return 0, layout.numel
        start = min(self._grid.data.rank * piece.numel(), layout.numel)
        return start, min(start + piece.numel(), layout.numel)

    def _accumulate_moments(self, work: list[tuple[dict[str, Any], Tensor]]) -> None:
        sums: list[Tensor] = []
        for group, piece in work:
            layout = group["layout"]
            if not layout.is_factored:
                continue
            start, end = self._range(layout, piece)
            whole = torch.zeros(layout.numel, device=piece.device)
            grad = piece.grad.flatten()[: end - start].float()
            whole[start:end] = grad.square() + _SMALLEST_SQUARE
            matrix = whole.view(layout.shape)
            sums += [matrix.sum(dim=1), matrix.sum(dim=0)]
        _sum_over(self._grid.data, sums)
        crossing = []
        pairs = iter(zip(sums[::2], sums[1::2], strict=True))
        factored = [(g, p, *next(pairs)) for g, p in work if g["layout"].is_factored]
        for group, _, rows, columns in factored:
            cut = group["layout"].partition_dim
            crossing += [columns] if cut == 0 else [rows] if cut == 1 else []
        _sum_over(self._grid.tensor, crossing)
        for group, piece, rows, columns in factored:
            height, width = self._logical_shape(group["layout"])
            self._decay(piece, "row", rows / width)
            self._decay(piece, "column", columns / height)
        for group, piece in work:
            if not group["layout"].is_factored:
                self._decay(piece, "full", piece.grad.float().square() + _SMALLEST_SQUARE)

    def _decay(self, piece: Tensor, key: str, fresh: Tensor) -> None:
        state = self.state[piece]
        if key not in state:
            state[key] = torch.zeros_like(fresh)
        state[key].mul_(self._beta2).add_(fresh, alpha=1 - self._beta2)

    def _direction(self, group: dict[str, Any], piece: Tensor) -> Tensor:
        """Gradient over the root of its second moment, in the shape of ``piece``."""
        layout, state = group["layout"], self.state[piece]
        correction = 1 - self._beta2**self.updates
        assert piece.grad is not None
        grad = piece.grad.float()
        if not layout.is_factored:
            return grad * torch.rsqrt(state["full"] / correction)
        row, column = state["row"] / correction, state["column"] / correction
        mean = row.sum()
        if layout.partition_dim == 0:
            _sum_over(self._grid.tensor, [mean])
        mean = mean / self._logical_shape(layout)[0]
        start, end = self._range(layout, piece)
        index = torch.arange(start, end, device=piece.device)
        width = layout.shape[1]
        moment = row[index // width] * column[index % width] / mean
        out = torch.zeros_like(grad)
        out.view(-1)[: end - start] = grad.flatten()[: end - start] * moment.rsqrt()
        return out

    def _square_sums(self, work: list[tuple[dict[str, Any], Tensor, Tensor]]) -> list[tuple[float, float]]:
        """Sums of squares of each whole (logical) parameter and of its direction."""
        local = []
        for _, weight, direction in work:
            local.append(torch.stack([weight.float().square().sum(), direction.square().sum()]))
        if not local:
            return []
        stacked = torch.stack(local)
        _sum_over(self._grid.data, [stacked])
        cut = [i for i, (group, _, _) in enumerate(work) if group["layout"].partition_dim is not None]
        if cut and self._grid.tensor.size > 1:
            shared = stacked[cut]
            dist.all_reduce(shared, group=self._grid.tensor.group)
            stacked[cut] = shared
        return [(float(a), float(b)) for a, b in stacked.tolist()]

    def _logical_shape(self, layout: ShardLayout) -> tuple[int, ...]:
        shape = list(layout.shape)
        if layout.partition_dim is not None:
            shape[layout.partition_dim] *= self._grid.tensor.size
        return tuple(shape)

    def _logical_numel(self, layout: ShardLayout) -> int:
        return int(torch.Size(self._logical_shape(layout)).numel())


def _sum_over(axis: Axis, tensors: list[Tensor]) -> None:
    """All-reduce several float32 tensors in place, as one message."""
    if axis.size == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=axis.group)
    offset = 0
    for tensor in tensors:
        tensor.copy_(flat[offset : offset + tensor.numel()].view(tensor.shape))
        offset += tensor.numel()
