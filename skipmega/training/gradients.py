"""Where gradients pile up over a step's micro-batches, and what ranks with the same weights make of them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from torch import Tensor, nn

from skipmega.config import RunConfig
from skipmega.parallel.grid import Axis

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
    between buckets. Here each rank's share is a slice, its mean over ranks is one collective, and the
    optimizer reads the slice.

    Args:
        optimizer: DeepSpeed's, of one of these stages.
        replicas: the ranks with the same weights.
        dtype: of the sums.
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer, replicas: Axis, dtype: torch.dtype) -> None:
        self._optimizer = optimizer
        self._replicas = replicas
        self._flat = [torch.zeros_like(flat, dtype=dtype) for flat in optimizer.bit16_groups_flat]
        self.sums: dict[nn.Parameter, Tensor] = {}
        self._shares = [self._share(group) for group in range(len(self._flat))]
        # as inside DeepSpeed's coalesce_grad_reduction: its hooks leave gradients where they are
        optimizer._coalesce_grad_reduction = True

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

    def _share(self, group: int) -> GradPartitionBufferGroup:
        """This rank's slice of a group, and the part of it that belongs to each parameter; also fills in the
        ``sums`` of the group's parameters."""
        weights, flat = self._optimizer.bit16_groups_flat[group], self._flat[group]
        size = self._optimizer.partition_size[group]
        begin = self._replicas.rank * size
        parts = []
        for parameter in self._optimizer.bit16_groups[group]:
            assert parameter.untyped_storage().data_ptr() == weights.untyped_storage().data_ptr()
            start = parameter.storage_offset() - weights.storage_offset()
            end = start + parameter.numel()
            self.sums[parameter] = flat[start:end].view(parameter.shape)
            if start < begin + size and begin < end:
                parts.append(flat[max(start, begin) : min(end, begin + size)])
        return GradPartitionBufferGroup(parts, flat[begin : begin + size])


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


def collect_gradients(engine: Any, config: RunConfig, replicas: Axis) -> Gradients:
    """Have autograd add up the gradients of the ``engine``'s parameters as ``config`` says.

    Those of bf16 weights are summed in fp32, unless ``training.gradient_precision`` is bf16. They are added
    in one pass, without a cast before, but to tied embeddings, whose two gradients would first be added
    up in bf16, and with ZeRO 3, where nothing is there to add them to.

    Args:
        engine: DeepSpeed's.
        config: the run's configuration.
        replicas: the ranks with the same weights.
    """
    wide, cuts_parameters = sums_in_fp32(config), config.parallel.zero_stage == 3
    if wide:
        for name, parameter in engine.module.named_parameters():
            cast_first = cuts_parameters or (config.model.tie_embeddings and name == "embedding.weight")
            parameter.grad_dtype = torch.float32 if cast_first else None
    if cuts_parameters:
        return PartitionedGradients(engine)
    weights = next(iter(engine.optimizer.bit16_groups_flat))
    return GradientSums(engine.optimizer, replicas, torch.float32 if wide else weights.dtype)


def sums_in_fp32(config: RunConfig) -> bool:
    """Whether gradients are wider than the bf16 weights they belong to."""
    return config.training.precision == "bf16" and config.training.gradient_precision == "fp32"
