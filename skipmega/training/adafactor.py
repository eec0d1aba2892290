"""Adafactor over ZeRO's flat partitions and tensor-parallel shards.

ZeRO hands an optimizer flat pieces of concatenated parameters; a factored second moment needs the rows and
columns of whole matrices. Told which range of which parameter lies where (:class:`Fragment`), each rank
sums the rows and columns of what it holds, and two collectives complete the sums on any grid.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skipmega.parallel.grid import Axis, ParallelGrid
from skipmega.parallel.logical import logical_shape, partition_dim

_SMALLEST_SQUARE = 1e-30  # epsilon_1 of the paper
_SMALLEST_SCALE = 1e-3  # epsilon_2 of the paper


@dataclass(frozen=True)
class Fragment:
    """What part of a parameter this data rank's flat piece holds.

    ``shape`` is the tensor-parallel rank's local shape, ``whole`` the logical one, ``dim`` the dimension cut
    over the tensor axis (None: replicated). Elements ``start .. start + numel`` of the flattened local
    parameter lie at ``offset`` in the piece.
    """

    name: str
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    dim: int | None
    start: int
    numel: int
    offset: int

    @property
    def elements(self) -> int:
        """Elements of the logical parameter."""
        return int(torch.Size(self.whole).numel())

    def of(self, flat: Tensor) -> Tensor:
        """The fragment's view of ``flat``, a tensor laid out as the piece."""
        return flat.narrow(0, self.offset, self.numel)


def locate(name: str, parameter: nn.Parameter, tensor_axis: Axis) -> Fragment:
    """Where ZeRO put ``parameter`` of this rank (nowhere: a fragment of no elements)."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    start, numel, offset = 0, 0, 0
    if mapping is not None:
        start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        offset = mapping.hp_fragment_address.start
    shape, whole = tuple(parameter.shape), logical_shape(parameter, tensor_axis)
    return Fragment(name, shape, whole, partition_dim(parameter), start, numel, offset)


class ShardedAdafactor(torch.optim.Optimizer):
    """Adafactor without first moment, with a fixed decay (arXiv 1804.04235, algorithm 4; SkipLayer's
    settings: beta1 = 0, beta2 = 0.99, update-RMS clipping at 1, steps relative to the parameter's RMS).

    Matrices have row and column moments, vectors a full one. Each group of parameters has a ``name``
    and is of one ``kind``, ``matrices`` or ``vectors``; DeepSpeed steps one group at a time, after
    :meth:`place` has told where ZeRO put what.

    Args:
        groups: of parameters.
        grid: completes the sums over replicas (ZeRO pieces) and tensor ranks (shards).
        lr: relative step size; the absolute one is ``lr * max(1e-3, RMS(parameter))``.
        beta2: decay of the second moment, bias-corrected.
        update_clip: updates with a larger RMS are scaled down to it.
    """

    def __init__(
        self, groups: list[dict[str, Any]], grid: ParallelGrid, *, lr: float, beta2: float, update_clip: float
    ) -> None:
        super().__init__(groups, {"lr": lr})
        self._grid = grid
        self._beta2 = beta2
        self._clip = update_clip

    def place(self, fragments: dict[str, list[Fragment]]) -> None:
        """Take the parameters' places by name of group, and make their moments (zero).

        Called once, when ZeRO has replaced each group's parameters by one flat piece.
        """
        for group in self.param_groups:
            group["fragments"] = fragments[group["name"]]
            (piece,) = group["params"]
            state = self.state[piece]
            state["step"] = torch.zeros(())
            if group["kind"] == "vectors":
                state["full"] = torch.zeros_like(piece)
                continue
            for fragment in group["fragments"]:
                height, width = fragment.shape
                state[f"row/{fragment.name}"] = torch.zeros(height, device=piece.device)
                state[f"column/{fragment.name}"] = torch.zeros(width, device=piece.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of the present groups; every rank of the grid calls it together."""
        for group in self.param_groups:
            (piece,) = group["params"]
            if piece.grad is None:
                continue
            gradient = piece.grad.float()
            self.state[piece]["step"] += 1
            if group["kind"] == "matrices":
                self._accumulate_factors(group, piece, gradient)
                directions = self._factored_directions(group, piece, gradient)
            else:
                directions = self._full_directions(group, piece, gradient)
            self._update(group, piece, directions)

    def _accumulate_factors(self, group: dict[str, Any], piece: Tensor, gradient: Tensor) -> None:
        """Decay the row and column moments towards this gradient's mean squares."""
        rows, columns = [], []
        for fragment in group["fragments"]:
            square = torch.zeros(int(torch.Size(fragment.shape).numel()), device=piece.device)
            grad = fragment.of(gradient)
            square.narrow(0, fragment.start, fragment.numel).copy_(grad.square() + _SMALLEST_SQUARE)
            matrix = square.view(fragment.shape)
            rows.append(matrix.sum(dim=1))
            columns.append(matrix.sum(dim=0))
        _sum_over(self._grid.replicas, [*rows, *columns])
        cut_rows = [c for f, c in zip(group["fragments"], columns, strict=True) if f.dim == 0]
        cut_columns = [r for f, r in zip(group["fragments"], rows, strict=True) if f.dim == 1]
        _sum_over(self._grid.tensor, [*cut_rows, *cut_columns])
        state = self.state[piece]
        for fragment, row, column in zip(group["fragments"], rows, columns, strict=True):
            height, width = fragment.whole
            state[f"row/{fragment.name}"].lerp_(row / width, 1 - self._beta2)
            state[f"column/{fragment.name}"].lerp_(column / height, 1 - self._beta2)

    def _factored_directions(self, group: dict[str, Any], piece: Tensor, gradient: Tensor) -> list[Tensor]:
        """Per fragment, gradient over the root of its factored moment: flat, float32."""
        state, correction = self.state[piece], self._correction(piece)
        rows = [state[f"row/{fragment.name}"] / correction for fragment in group["fragments"]]
        totals = [row.sum() for row in rows]
        cut = [total for f, total in zip(group["fragments"], totals, strict=True) if f.dim == 0]
        _sum_over(self._grid.tensor, cut)
        directions = []
        for fragment, row, total in zip(group["fragments"], rows, totals, strict=True):
            column = state[f"column/{fragment.name}"] / correction
            index = torch.arange(fragment.start, fragment.start + fragment.numel, device=piece.device)
            width = fragment.shape[1]
            # root by root: the product of the two moments of a row without gradient is no float32 any more
            by_row, by_column = (row * (fragment.whole[0] / total)).rsqrt(), column.rsqrt()
            scale = by_row[index // width] * by_column[index % width]
            directions.append(fragment.of(gradient) * scale)
        return directions

    def _full_directions(self, group: dict[str, Any], piece: Tensor, gradient: Tensor) -> list[Tensor]:
        moment = self.state[piece]["full"]
        moment.lerp_(gradient.square() + _SMALLEST_SQUARE, 1 - self._beta2)
        direction = gradient * (moment / self._correction(piece)).rsqrt()
        return [fragment.of(direction) for fragment in group["fragments"]]

    def _correction(self, piece: Tensor) -> float:
        return float(1 - self._beta2 ** self.state[piece]["step"].item())

    def _update(self, group: dict[str, Any], piece: Tensor, directions: list[Tensor]) -> None:
        fragments: list[Fragment] = group["fragments"]
        weights = [fragment.of(piece.data) for fragment in fragments]
        squares = torch.stack(
            [
                torch.stack([weight.float().square().sum(), direction.square().sum()])
                for weight, direction in zip(weights, directions, strict=True)
            ]
        )
        _sum_over(self._grid.replicas, [squares])
        _sum_over(self._grid.tensor, [squares[i] for i, f in enumerate(fragments) if f.dim is not None])
        elements = torch.tensor([fragment.elements for fragment in fragments], device=piece.device)
        rms = (squares / elements.unsqueeze(1)).sqrt()
        scale = rms[:, 0].clamp(min=_SMALLEST_SCALE) / (rms[:, 1] / self._clip).clamp(min=1.0)
        for weight, direction, factor in zip(weights, directions, scale, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.sub_(direction * (group["lr"] * factor))


def _sum_over(axis: Axis, tensors: list[Tensor]) -> None:
    """All-reduce several float32 tensors in place, as one message."""
    if axis.size == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=axis.group)
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(total.view(tensor.shape))
