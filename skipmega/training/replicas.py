"""Whether ranks that should hold the same do: bits of weights over replicas, values over tensor ranks.

ZeRO keeps one fp32 master of every weight, cut over the replicas, and each rank's copy of the weights is what
the masters gave it after the last update. The bit patterns of a tensor, summed as integers, are its
fingerprint; those of the masters' pieces add up to that of the whole. So there is a truth to compare every
copy with, even among two ranks.
"""

import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from skipmega.parallel.agreement import Agreement
from skipmega.parallel.grid import Axis
from skipmega.parallel.logical import partition_dim
from skipmega.training.engine import TrainingEngine
from skipmega.training.state import hold

_BITS = {2: torch.int16, 4: torch.int32}
_TOLERANCE = 1e-3  # of a tensor's norm: sums over tokens need not come out the same on every tensor rank


@dataclass(frozen=True)
class Drift:
    """What ranks should have had in common: one sentence a rank and tensor; ``renewable`` if only copies of
    weights are wrong, whose masters are not."""

    findings: list[str]
    renewable: bool

    def describe(self) -> str:
        """The first findings, in one line."""
        more = len(self.findings) - 3
        return "; ".join(self.findings[:3]) + (f"; and {more} more" if more > 0 else "")


class ReplicaCheck:
    """Compares what should be equal; making one is collective, as are its methods.

    Args:
        engine: whose weights, moments and routing state.
    """

    def __init__(self, engine: TrainingEngine) -> None:
        self._engine, self._grid = engine, engine.grid
        self._agreement = Agreement()
        self._hosts = [""] * self._grid.world_size
        dist.all_gather_object(self._hosts, socket.gethostname())

    def find(self) -> Drift | None:
        """Everything that differs, the same on every process; None if nothing does."""
        beyond_mending = [*self._wrong_routing(), *self._wrong_over_tensor_axis()]
        mine = [*self._wrong_copies(), *((words, False) for words in beyond_mending)]
        (found,) = self._agreement.greatest(bool(mine))
        if not found:
            return None
        parts: list[list[tuple[str, bool]]] = [[]] * self._grid.world_size
        dist.all_gather_object(parts, mine)
        findings = dict(finding for part in parts for finding in part)
        return Drift(list(findings), renewable=all(findings.values()))

    def _wrong_copies(self) -> list[tuple[str, bool]]:
        """Weights that are not what the masters say, and whether the masters are beyond doubt."""
        names, rows = [], []
        for name, parameter in self._engine.stage.named_parameters():
            held = hold(self._engine, parameter)
            names.append(name)
            rows.append(torch.stack([fingerprint(t) for t in (held.copy, held.piece, held.master_as_copy())]))
        copies, pieces, masters = _gather(torch.stack(rows), self._grid.replicas).unbind(-1)
        cut = self._engine.config.parallel.zero_stage == 3
        wrong = copies != (masters if cut else masters.sum(0))
        found = []
        for i in (wrong.any(0)).nonzero().flatten().tolist():
            beyond_doubt = not cut and not wrong[:, i].all()
            of_owners = pieces[:, i] != masters[:, i]
            ranks = wrong[:, i] if beyond_doubt or not of_owners.any() else of_owners
            what = "copy is not its master's" if beyond_doubt else "fp32 master is not what was copied of it"
            found += [
                (f"{names[i]} on {self._who(self._grid.replicas, rank)}: its {what}", beyond_doubt)
                for rank in ranks.nonzero().flatten().tolist()
            ]
        return found

    def _wrong_routing(self) -> list[str]:
        """What routing remembers, which all replicas move by the same means."""
        tensors = self._engine.routing_tensors()
        if not tensors:
            return []
        ranks = _gather(torch.stack([fingerprint(t) for t in tensors.values()]), self._grid.replicas)
        return [
            f"routing's {name} on {self._who(self._grid.replicas, rank)} is not that of other replicas"
            for name, column in zip(tensors, ranks.unbind(1), strict=True)
            for rank in _minority(column)
        ]

    def _wrong_over_tensor_axis(self) -> list[str]:
        """fp32 masters and moments of the weights that every tensor rank has whole (norms, routers)."""
        if self._grid.tensor.size == 1:
            return []
        names, values = [], []
        for name, parameter in self._engine.stage.named_parameters():
            if partition_dim(parameter) is None:
                held = hold(self._engine, parameter)
                for kind, tensor in {"fp32 master": held.master, **held.moments}.items():
                    names.append(f"{name}'s {kind}")
                    values.append(tensor.flatten().float())
        ranks = _gather(torch.cat(values), self._grid.tensor).split([v.numel() for v in values], dim=1)
        return [
            f"{name} on {self._who(self._grid.tensor, rank)} is not that of other tensor ranks"
            for name, tensor in zip(names, ranks, strict=True)
            for rank in _far_off(tensor)
        ]

    def _who(self, axis: Axis, rank: int) -> str:
        number = dist.get_global_rank(axis.group, rank)
        return f"rank {number} (host {self._hosts[number]})"


def fingerprint(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bit patterns, [] int64; of parts it is the sum of theirs."""
    bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()])
    return bits.sum(dtype=torch.int64)


def _gather(mine: Tensor, axis: Axis) -> Tensor:
    """[ranks of the axis, ...] of ``mine`` [...]."""
    ranks = [torch.empty_like(mine) for _ in range(axis.size)]
    dist.all_gather(ranks, mine, group=axis.group)
    return torch.stack(ranks)


def _minority(values: Tensor) -> list[int]:
    """Numbers of the ranks that differ from most, of all if there is no majority. ``values`` [ranks]."""
    usual = values.mode().values
    differs = values != usual
    if 2 * int(differs.sum()) >= len(values):
        differs = torch.ones_like(differs)
    return differs.nonzero().flatten().tolist() if (values != usual).any() else []


def _far_off(ranks: Tensor) -> list[int]:
    """Numbers of the ranks that are far from most; of two, both. ``ranks`` [ranks, values] float32."""
    usual = ranks.mean(0) if len(ranks) == 2 else ranks.median(0).values
    near = (ranks - usual).norm(dim=1) <= _TOLERANCE * usual.norm()  # not so if anything is NaN
    return (~near).nonzero().flatten().tolist()
