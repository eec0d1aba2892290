"""Load-balanced dispatch: moving packed rows between ranks so that all run the same number.

Without capacities, ranks that hold different tokens (data-parallel replicas, parts of a sequence) execute
unequal numbers of them, and all wait for the fullest. What works row by row (the feed-forward network) has
the same weights on all of them, so rows can be moved, run where there is room, and brought home; gradients go
the reverse way, and those of the weights are summed over the ranks anyway.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from skipmega.parallel.grid import Axis


@dataclass(frozen=True)
class BalancePlan:
    """Who sends how many rows to whom; the same on every rank.

    ``counts`` are the rows each rank brings, ``targets`` those it runs: the mean, rounded up on the fullest
    ranks and down on the others. ``moves[i][j]`` rows go from rank i to rank j.
    """

    counts: tuple[int, ...]
    targets: tuple[int, ...]
    moves: tuple[tuple[int, ...], ...]

    @property
    def moved(self) -> int:
        """Rows that change the rank, each way."""
        return sum(map(sum, self.moves))

    def sent(self, rank: int) -> list[int]:
        """Rows that ``rank`` sends to each rank."""
        return list(self.moves[rank])

    def received(self, rank: int) -> list[int]:
        """Rows that ``rank`` receives from each rank."""
        return [row[rank] for row in self.moves]


def plan_balance(counts: Sequence[int]) -> BalancePlan:
    """The plan that moves the fewest rows: nobody both sends and receives.

    Args:
        counts: rows of each rank.
    """
    ranks = range(len(counts))
    floor, left = divmod(sum(counts), len(counts))
    fullest = sorted(ranks, key=lambda rank: (-counts[rank], rank))[:left]
    targets = [floor + (rank in fullest) for rank in ranks]
    moves = [[0] * len(counts) for _ in ranks]
    room = [max(0, target - count) for target, count in zip(targets, counts, strict=True)]
    receiver = 0
    for sender in ranks:
        surplus = max(0, counts[sender] - targets[sender])
        while surplus:
            while not room[receiver]:
                receiver += 1
            taken = min(surplus, room[receiver])
            moves[sender][receiver] += taken
            room[receiver] -= taken
            surplus -= taken
    return BalancePlan(tuple(counts), tuple(targets), tuple(map(tuple, moves)))


def gather_counts(rows: int, axis: Axis, device: torch.device) -> list[int]:
    """How many rows each rank of the axis has, by rank; waits for the device once.

    Args:
        rows: of this rank.
        axis: whose ranks all call it together.
        device: the one that the axis communicates on.
    """
    counts = torch.zeros(axis.size, dtype=torch.int64, device=device)
    mine = torch.tensor([rows], dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, mine, group=axis.group)
    return [int(count) for count in counts.tolist()]


def run_balanced(
    rows: Tensor, run: Callable[[Tensor], Tensor], axis: Axis, plan: BalancePlan, pad: bool = False
) -> Tensor:
    """Run on the planned number of rows what works row by row; every rank of the axis calls it together.

    Args:
        rows: [n, hidden] of this rank, n = ``plan.counts[axis.rank]``, 0 included; any float dtype, the same
            on every rank. Whether it needs a gradient may differ between ranks.
        run: maps [m, hidden] to [m, out] of any float dtype, each row by itself, m = 0 included.
        axis: the ranks that share the work; ``run`` has the same weights on all of them.
        plan: from :func:`plan_balance` of all ranks' numbers.
        pad: give ``run`` the largest of the targets on every rank, the rest being zeros.

    Returns:
        [n, out], in the order of ``rows``, of the dtype that ``run`` gives. If rows move and gradients are
        enabled it needs one on every rank, and every rank must run backward through it.
    """
    mine, sent, received = axis.rank, plan.sent(axis.rank), plan.received(axis.rank)
    assert len(rows) == plan.counts[mine]
    if plan.moved and torch.is_grad_enabled() and not rows.requires_grad:
        # or this rank's backward would leave out an exchange that the others wait in
        rows = rows.detach().requires_grad_()
    stays = rows.shape[0] - sum(sent)
    home, leaving = rows[:stays], rows[stays:]
    if plan.moved:
        home = torch.cat([home, _exchange(leaving, sent, received, axis)])
    missing = max(plan.targets) - plan.targets[mine] if pad else 0
    results = run(torch.nn.functional.pad(home, (0, 0, 0, missing)) if missing else home)
    results = results[: plan.targets[mine]]
    if not plan.moved:
        return results
    returned = _exchange(results[stays:], received, sent, axis)
    return torch.cat([results[:stays], returned])


def _exchange(rows: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
    exchanged: Tensor = _AllToAll.apply(rows, sent, received, axis)
    return exchanged


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
        ctx.sent, ctx.received, ctx.axis = sent, received, axis
        out = rows.new_empty((sum(received), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=axis.group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out = grad.new_empty((sum(ctx.sent), *grad.shape[1:]))
        dist.all_to_all_single(out, grad.contiguous(), ctx.sent, ctx.received, group=ctx.axis.group)
        return out, None, None, None
