"""The grid of processes as an object that is passed: who shares what with whom.

megatron-core owns the process groups (its layers and schedules look them up); :class:`ParallelGrid` is
the one handle on them that the rest of skipmega sees.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch._C._distributed_c10d import HashStore

from skipmega.config import ParallelConfig
from skipmega.errors import ConfigError
from skipmega.parallel.cpu import run_megatron_on_cpu
from skipmega.parallel.process import ProcessInfo


@dataclass(frozen=True)
class Axis:
    """One dimension of the grid as this process sees it."""

    size: int
    rank: int
    group: dist.ProcessGroup

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean of ``tensor`` over the axis, as a new detached tensor of the same shape and dtype."""
        total = tensor.detach().clone()
        if self.size > 1:
            dist.all_reduce(total, group=self.group)
        return total / self.size


@dataclass(frozen=True)
class ParallelGrid:
    """This process's place in tensor x context x data x pipeline parallelism.

    ``model`` is the tensor x pipeline group (all weights of one replica); ``embedding`` is the group of first
    and last pipeline stage that share tied embeddings, None on stages in between.

    Ranks of ``data`` read different samples, those of ``context`` different tokens of one; ``replicas`` is
    both, the ranks that hold the same weights and among which ZeRO cuts the optimizer's states. With
    ``sequence_parallel`` the ranks of ``tensor`` too hold different tokens between the matrix products of a
    layer. ``shards`` are the ranks that share one sample's tokens, ``tokens`` all that hold different ones.
    """

    rank: int
    world_size: int
    device: torch.device
    tensor: Axis
    context: Axis
    pipeline: Axis
    data: Axis
    replicas: Axis
    shards: Axis
    tokens: Axis
    model: Axis
    embedding: dist.ProcessGroup | None
    sequence_parallel: bool

    @property
    def is_first_stage(self) -> bool:
        """Whether this process holds the embedding."""
        return self.pipeline.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the head and sees the loss."""
        return self.pipeline.rank == self.pipeline.size - 1

    def broadcast_from_last_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give every stage the last stage's ``tensor`` (same shape and dtype everywhere), in place."""
        if self.pipeline.size > 1:
            source = dist.get_process_group_ranks(self.pipeline.group)[-1]
            dist.broadcast(tensor, src=source, group=self.pipeline.group)
        return tensor

    def describe(self) -> str:
        """The grid in one line for the log."""
        sequence = " (sequence parallel)" if self.sequence_parallel else ""
        return (
            f"{self.world_size} processes: tensor {self.tensor.size}{sequence} x context "
            f"{self.context.size} x pipeline {self.pipeline.size} x data {self.data.size} on "
            f"{self.device.type}, {dist.get_backend()}"
        )


def create_grid(process: ProcessInfo, parallel: ParallelConfig | None = None) -> ParallelGrid:
    """Start communication and cut the world into the grid.

    Args:
        process: this process, from :func:`skipmega.launch.environment.discover_process`.
        parallel: sizes of the axes; left out, all processes are data parallel.

    Raises:
        ConfigError: more local processes than devices, or a world the grid does not divide.
    """
    parallel = parallel or ParallelConfig()
    if process.world_size % parallel.processes_per_replica:
        raise ConfigError(
            f"{process.world_size} processes cannot hold {parallel.describe_replica()}: start a multiple of "
            f"{parallel.processes_per_replica} processes"
        )
    device = _local_device(process)
    timeout = timedelta(minutes=parallel.timeout_minutes)
    if not dist.is_initialized():
        _start_communication(process, device, timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        virtual_pipeline_model_parallel_size=(
            parallel.chunks_per_stage if parallel.chunks_per_stage > 1 else None
        ),
        context_parallel_size=parallel.context_parallel,
        distributed_timeout_minutes=max(1, round(parallel.timeout_minutes)),
        create_gloo_process_groups=False,
    )
    shards = parallel_state.get_context_parallel_group()
    tokens = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if parallel.sequence_parallel:
        shards = parallel_state.get_tensor_and_context_parallel_group()
        tokens = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    return ParallelGrid(
        rank=process.rank,
        world_size=process.world_size,
        device=device,
        tensor=_axis(parallel_state.get_tensor_model_parallel_group()),
        context=_axis(parallel_state.get_context_parallel_group()),
        pipeline=_axis(parallel_state.get_pipeline_model_parallel_group()),
        data=_axis(parallel_state.get_data_parallel_group()),
        replicas=_axis(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        shards=_axis(shards),
        tokens=_axis(tokens),
        model=_axis(parallel_state.get_model_parallel_group()),
        embedding=parallel_state.get_embedding_group(check_initialized=False),
        sequence_parallel=parallel.sequence_parallel,
    )


def release_grid() -> None:
    """End the grid's groups so that another can be created; communication of the world stays up."""
    groups = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()
    for group in groups:
        if group is not None:  # the world
            dist.destroy_process_group(group)


def end_communication() -> None:
    """Leave the job: forget the grid and torch's process groups."""
    release_grid()
    if dist.is_initialized():
        dist.destroy_process_group()


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(size=group.size(), rank=group.rank(), group=group)


def _local_device(process: ProcessInfo) -> torch.device:
    if not torch.cuda.is_available():
        run_megatron_on_cpu()
        return torch.device("cpu")
    if process.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {process.local_rank} has no GPU: this host has {torch.cuda.device_count()}; start "
            "at most that many processes per host"
        )
    torch.cuda.set_device(process.local_rank)
    return torch.device("cuda", process.local_rank)


def _start_communication(process: ProcessInfo, device: torch.device, timeout: timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if process.is_alone:
        # DeepSpeed asks the environment who it is even when a process group exists
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
