"""What a process sees in its micro-batches, and the grid's means of it: no host sync until they are read.

Not one: a host that waits for its GPU once in a micro-batch has nothing queued when the next layers, which
take longer to launch than to run where few tokens execute, are due.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skipmega.config import RunConfig
from skipmega.models.layer import RoutingRecord
from skipmega.parallel.grid import ParallelGrid
from skipmega.parallel.sequence import SequenceShards
from skipmega.training.clock import ForwardClock

_MEANS = ("density", "executed", "entropy")
_HOST_MEANS = ("computed", "moved")


@dataclass
class StepSums:
    """Sums over some micro-batches of this process's tokens, where they are known: on its device or its host.

    ``loss`` [] float32 sum of nats and ``tokens`` [] float32 their number (last stage; zero elsewhere). The
    rest is [num_layers] float32, filled for this stage's routed layers: ``counted`` micro-batches, and sums
    over them of the share of tokens chosen (``density``), that ran (``executed``), the rows computed for them
    per token (``computed``, padding included), the tokens that another rank computed (``moved``) and the
    decisions' ``entropy`` in nats; ``fullest`` is the largest share of a group that ran. ``router_gradients``
    are the last step's, not yet averaged over replicas, [rows] by layer. ``clock`` measures the forward
    passes.
    """

    loss: Tensor
    tokens: Tensor
    counted: Tensor
    density: Tensor
    executed: Tensor
    entropy: Tensor
    fullest: Tensor
    computed: list[float]
    moved: list[float]
    group_size: int | None
    shards: SequenceShards
    clock: ForwardClock
    router_gradients: dict[int, Tensor] = field(default_factory=dict)
    indices: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @classmethod
    def zeros(cls, config: RunConfig, grid: ParallelGrid) -> "StepSums":
        """Nothing seen yet."""

        def of_layers() -> Tensor:
            return torch.zeros(config.model.num_layers, device=grid.device)

        return cls(
            loss=torch.zeros((), device=grid.device),
            tokens=torch.zeros((), device=grid.device),
            counted=of_layers(),
            density=of_layers(),
            executed=of_layers(),
            entropy=of_layers(),
            fullest=of_layers(),
            computed=[0.0] * config.model.num_layers,
            moved=[0.0] * config.model.num_layers,
            group_size=config.routing.group_size,
            shards=SequenceShards.of(grid),
            clock=ForwardClock(grid.device),
        )

    def copy(self) -> "StepSums":
        """The same sums, to add to without touching these; the clock is shared."""
        other = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor | list):
                setattr(other, name, value.clone() if isinstance(value, Tensor) else list(value))
        return other

    @torch.no_grad()
    def add_routing(self, records: Mapping[int, RoutingRecord]) -> None:
        """Count one micro-batch's records, by global layer number."""
        if not records:
            return
        layers, each = tuple(records), list(records.values())
        if layers not in self.indices:
            self.indices[layers] = torch.tensor(layers, device=self.counted.device)
        at = self.indices[layers]
        executed = torch.stack([record.executed for record in each]).float()
        chosen = torch.stack([record.chosen for record in each])
        self.counted.index_add_(0, at, torch.ones_like(at, dtype=torch.float32))
        self.density.index_add_(0, at, chosen.mean(dim=(1, 2)))
        self.executed.index_add_(0, at, executed.mean(dim=(1, 2)))
        self.entropy.index_add_(0, at, torch.stack([record.entropy for record in each]))
        grouped = self.shards.whole(executed, dim=1) if self.group_size is None else executed
        of_groups = grouped.unflatten(1, (-1, self.group_size or grouped.shape[1])).mean(dim=2)
        self.fullest[at] = torch.maximum(self.fullest[at], of_groups.amax(dim=(1, 2)))
        for layer, record in records.items():
            self.computed[layer] += record.slots / executed[0].numel()
            self.moved[layer] += record.moved / executed[0].numel()

    def keep_router_gradients(self, weights: Mapping[int, nn.Parameter]) -> None:
        """Copy the gradients of this step's routers before the optimizer takes them."""
        self.router_gradients = {
            layer: weight.grad.float().flatten().clone()
            for layer, weight in weights.items()
            if weight.grad is not None
        }


@dataclass(frozen=True)
class Averages:
    """Global means of :class:`StepSums`: ``loss`` in nats per token, ``learnt`` the number of those,
    the rest by global layer number.

    ``router_gradient`` is the norm of the last step's gradient (before clipping); ``fullest_group`` the
    largest share of a group that ran, ``fullest_rank`` the largest mean share of a rank.
    ``stage_seconds`` is the time of each pipeline stage's forward pass of a micro-batch.
    """

    loss: float
    learnt: float
    density: list[float]
    executed: list[float]
    computed: list[float]
    moved: list[float]
    entropy: list[float]
    router_gradient: list[float]
    fullest_group: list[float]
    fullest_rank: list[float]
    stage_seconds: list[float]


def mean_loss(before: StepSums, after: StepSums, grid: ParallelGrid) -> float:
    """The loss in nats per token of what was added to ``before``; the same bits on every process, of every
    axis, so that all decide alike by it."""
    added = torch.stack([after.loss - before.loss, after.tokens - before.tokens])
    for axis in (grid.replicas, grid.pipeline, grid.tensor):
        dist.all_reduce(added, group=axis.group)
    loss, tokens = added.tolist()
    return loss / max(tokens, 1.0)


def average(sums: StepSums, config: RunConfig, grid: ParallelGrid) -> Averages:
    """Reduce over the grid; every process calls it together and gets the same."""
    layers = config.model.num_layers
    of_device = torch.stack([getattr(sums, name) for name in _MEANS])
    of_host = of_device.new_tensor([getattr(sums, name) for name in _HOST_MEANS])
    means = torch.cat([of_device, of_host]) / sums.counted.clamp(min=1)
    peaks = torch.stack([sums.fullest, means[_MEANS.index("executed")]])
    norms = means.new_zeros(layers)
    if sums.router_gradients:
        gradients = grid.replicas.mean(torch.stack(list(sums.router_gradients.values())))
        norms[list(sums.router_gradients)] = gradients.norm(dim=1)
    losses = torch.stack([sums.loss, sums.tokens])
    dist.all_reduce(losses, group=grid.replicas.group)
    seconds = means.new_zeros(grid.pipeline.size)
    seconds[grid.pipeline.rank] = sums.clock.mean() * config.parallel.chunks_per_stage
    total = torch.cat([losses, grid.tokens.mean(means).flatten(), norms, grid.replicas.mean(seconds)])
    dist.all_reduce(total, group=grid.pipeline.group)
    for axis in (grid.tokens, grid.pipeline):
        dist.all_reduce(peaks, group=axis.group, op=dist.ReduceOp.MAX)
    loss, tokens, *rest = torch.cat([total[: -len(seconds)], peaks.flatten()]).tolist()
    by_layer = (*_MEANS, *_HOST_MEANS, "router_gradient", "fullest_group", "fullest_rank")
    lists = {name: rest[i * layers : (i + 1) * layers] for i, name in enumerate(by_layer)}
    mean, times = loss / max(tokens, 1.0), total[-len(seconds) :].tolist()
    return Averages(loss=mean, learnt=tokens, stage_seconds=times, **lists)
