"""Where gradients pile up over a step's micro-batches, and what ranks with the same weights make of them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from torch import Tensor, nn

from skipmega.config import RunConfig
from skipmega.parallel.grid import ParallelGrid
from skipmega.parallel.logical import partition_dim

# torch 2.13 gave it another name, and warns of this one
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Gradients(Protocol):
    """Of one model, step after step."""

    def of_step(self) -> AbstractContextManager[None]:
        """Inside, backward passes add to the ``grad`` of each parameter, which is zero or None at first; at
        the end their mean over ranks with the same weights goes to the optimizer."""


class GradientSums:
    """Gradients with ZeRO 1 and 2, in one tensor a group of parameters, laid out as ZeRO cuts it.

    DeepSpeed's own path rounds the sums to the weights' dtype and copies each parameter's some eight times
    between buckets; looking for what is not finite, and the norm, launch a dozen kernels a parameter. Here
    each rank's share is a slice, its mean over ranks is one collective, one norm tells both, and the
    optimizer reads the slice.

    Args:
        optimizer: DeepSpeed's, of one of these stages.
        grid: this process's place.
        dtype: of the sums.
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer, grid: ParallelGrid, dtype: torch.dtype) -> None:
        self._optimizer = optimizer
        self._replicas, self._tensor = grid.replicas, grid.tensor
        self._flat = [torch.zeros_like(flat, dtype=dtype) for flat in optimizer.bit16_groups_flat]
        self.sums: dict[nn.Parameter, Tensor] = {}
        self._counted: list[Tensor] = []
        self._shares = [self._share(group) for group in range(len(self._flat))]
        # as inside DeepSpeed's coalesce_grad_reduction: its hooks leave gradients where they are
        optimizer._coalesce_grad_reduction = True
        # a norm that is not finite is an overflow to DeepSpeed: it need not look for one before
        optimizer.check_overflow = lambda **_: None
        optimizer.scaled_global_norm = self.norm

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """See :meth:`Gradients.of_step`."""
        for flat in self._flat:
            flat.zero_()
        for parameter, total in self.sums.items():
            parameter.grad = total
        yield
        for group, (flat, share) in enumerate(zip(self._flat, self._shares, strict=True)):
            if self._replicas.size > 1:
                _reduce_scatter(share.flat_partition, flat, group=self._replicas.group)
                share.flat_partition.div_(self._replicas.size)
            self._optimizer.averaged_gradients[group] = share
        for parameter in self.sums:
            parameter.grad = None

    def norm(self) -> Tensor:
        """[] float32: of the gradients of the whole model; all processes call it together."""
        squared = torch.zeros((), dtype=torch.float64, device=self._flat[0].device)
        for part in self._counted:
            squared += _squared_norm(part)
        dist.all_reduce(squared)
        return squared.sqrt().float()

    def _share(self, group: int) -> GradPartitionBufferGroup:
        """This rank's slice of a group, and the part of it that belongs to each parameter; also fills in the
        ``sums`` of the group's parameters, and what this rank counts in the norm."""
        weights, flat = self._optimizer.bit16_groups_flat[group], self._flat[group]
        size = self._optimizer.partition_size[group]
        begin = self._replicas.rank * size
        parts, counted = [], []
        for parameter in self._optimizer.bit16_groups[group]:
            assert parameter.untyped_storage().data_ptr() == weights.untyped_storage().data_ptr()
            start = parameter.storage_offset() - weights.storage_offset()
            end = start + parameter.numel()
            self.sums[parameter] = flat[start:end].view(parameter.shape)
            start, end = max(start, begin), min(end, begin + size)
            if start < end:
                parts.append(flat[start:end])
                if self._counts(parameter):
                    counted.append((start, end))
        self._counted += [flat[start:end] for start, end in _joined(counted)]
        return GradPartitionBufferGroup(parts, flat[begin : begin + size])

    def _counts(self, parameter: nn.Parameter) -> bool:
        """Whether no other rank counts the parameter's share: one of several that have it whole does."""
        elsewhere = getattr(parameter, "ds_pipe_replicated", False)
        return not elsewhere and (partition_dim(parameter) is not None or self._tensor.rank == 0)


class PartitionedGradients:
    """Gradients with ZeRO 3, which DeepSpeed reduces as it cuts the weights.

    Args:
        engine: DeepSpeed's.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def of_step(self) -> AbstractContextManager[None]:
        """See :meth:`Gradients.of_step`."""
        context: AbstractContextManager[None] = self._engine.coalesce_grad_reduction()
        return context


def collect_gradients(engine: Any, config: RunConfig, grid: ParallelGrid) -> Gradients:
    """Have autograd add up the gradients of the ``engine``'s parameters as ``config`` says.

    Those of bf16 weights are summed in fp32, unless ``training.gradient_precision`` is bf16. They are added
    in one pass, without a cast before, but to tied embeddings, whose two gradients would first be added
    up in bf16, and with ZeRO 3, where nothing is there to add them to.

    Args:
        engine: DeepSpeed's.
        config: the run's configuration.
        grid: this process's place.
    """
    wide, cuts_parameters = sums_in_fp32(config), config.parallel.zero_stage == 3
    if wide:
        for name, parameter in engine.module.named_parameters():
            cast_first = cuts_parameters or (config.model.tie_embeddings and name == "embedding.weight")
            parameter.grad_dtype = torch.float32 if cast_first else None
    if cuts_parameters:
        return PartitionedGradients(engine)
    weights = next(iter(engine.optimizer.bit16_groups_flat))
    return GradientSums(engine.optimizer, grid, torch.float32 if wide else weights.dtype)


def sums_in_fp32(config: RunConfig) -> bool:
    """Whether gradients are wider than the bf16 weights they belong to."""
    return config.training.precision == "bf16" and config.training.gradient_precision == "fp32"


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same places in ascending spans of which none touches the next."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


def _squared_norm(values: Tensor) -> Tensor:
    """[n] to [] float64. Rows of 1024 are summed in fp32, which is exact enough for those; a sum of millions
    is not (CPU: 6e-4 off at 10M), and float64 throughout would copy everything."""
    cut = values.numel() // 1024 * 1024
    rows, rest = values[:cut].view(-1, 1024), values[cut:].unsqueeze(0)
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in (rows, rest)]
    return torch.cat(norms).double().square().sum()
