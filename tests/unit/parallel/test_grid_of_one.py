"""What the grid promises where one process can tell; grids of many are the parity tests' matter."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules

from skipmega.config import ParallelConfig
from skipmega.errors import ConfigError
from skipmega.parallel.grid import Axis, ParallelGrid, create_grid
from skipmega.parallel.layers import token_losses
from skipmega.parallel.logical import local_shard, logical_shape
from skipmega.parallel.mpu import DeepSpeedMpu
from skipmega.parallel.process import ProcessInfo


def test_one_process_is_first_last_and_everything_between(grid: ParallelGrid) -> None:
    axes = (grid.tensor, grid.context, grid.pipeline, grid.data, grid.model)
    for axis in (*axes, grid.replicas, grid.shards, grid.tokens):
        assert (axis.size, axis.rank) == (1, 0)
    assert grid.is_first_stage
    assert grid.is_last_stage
    assert grid.describe() == "1 processes: tensor 1 x context 1 x pipeline 1 x data 1 on cpu, gloo"


def test_a_mean_over_an_axis_is_a_detached_copy(grid: ParallelGrid) -> None:
    tensor = torch.ones(3, requires_grad=True)
    mean = grid.data.mean(tensor)
    assert torch.equal(mean, tensor)
    assert not mean.requires_grad
    assert mean.data_ptr() != tensor.data_ptr()


def test_a_world_that_the_grid_does_not_divide_is_refused_before_communication_starts() -> None:
    process = ProcessInfo(rank=0, world_size=6, local_rank=0, launcher="torchrun")
    with pytest.raises(
        ConfigError,
        match=r"6 processes cannot hold parallel.tensor_parallel=2 x parallel.pipeline_parallel=2",
    ):
        create_grid(process, ParallelConfig(tensor_parallel=2, pipeline_parallel=2))


def test_deepspeed_is_told_of_groups_and_never_of_sequence_parallelism(grid: ParallelGrid) -> None:
    mpu = DeepSpeedMpu(grid)
    assert not hasattr(mpu, "initialize_sequence_parallel")
    for name in ("model_parallel", "data_parallel", "tensor_model_parallel", "pipeline_model_parallel"):
        assert getattr(mpu, f"get_{name}_world_size")() == 1
        assert getattr(mpu, f"get_{name}_rank")() == 0
        assert isinstance(getattr(mpu, f"get_{name}_group")(), dist.ProcessGroup)
    assert mpu.get_data_parallel_group_ranks() == [0]
    assert mpu.get_tensor_model_parallel_src_rank() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is for hosts without a GPU")
def test_megatron_s_cuda_is_the_cpu_and_torch_s_own_stays(grid: ParallelGrid) -> None:
    assert schedules.torch.zeros(2, device="cuda").device.type == "cpu"
    assert schedules.torch.cuda.current_device() == torch.device("cpu")
    assert schedules.torch is not torch
    assert schedules.torch.float32 is torch.float32
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")


def test_token_losses_are_nats(grid: ParallelGrid) -> None:
    logits = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1], [2, 3], [4, 0]])
    found = token_losses(logits.bfloat16(), labels, grid.tensor)
    wide = logits.bfloat16().double()
    expected = wide.logsumexp(-1) - wide.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_shards_put_together_are_the_logical_tensor(dim: int | None) -> None:
    logical = torch.arange(24.0).view(4, 6)
    shards = []
    for rank in range(2):
        axis = Axis(size=2, rank=rank, group=None)  # type: ignore[arg-type]
        parameter = logical if dim is None else logical.chunk(2, dim)[0].clone()
        if dim is not None:
            parameter.tensor_model_parallel, parameter.partition_dim = True, dim  # type: ignore[attr-defined]
        assert logical_shape(parameter, axis) == (4, 6)
        shards.append(local_shard(logical, parameter, axis))
    assert torch.equal(shards[0] if dim is None else torch.cat(shards, dim), logical)
