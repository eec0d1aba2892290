"""DeepSpeed's view of the grid.

``deepspeed.initialize(mpu=...)`` asks an object like the Megatron of old. Today's
``megatron.core.parallel_state`` lacks part of it and raises; ``mpu=None`` makes DeepSpeed average the
shards of different matrices, without a word. There must be no attribute ``initialize_sequence_parallel``:
DeepSpeed reads it as "no model parallelism". Context-parallel ranks are data-parallel ones to it: they hold
the same weights, and each has gradients of its own tokens.
"""

import torch.distributed as dist

from skipmega.parallel.grid import ParallelGrid


class DeepSpeedMpu:
    """Adapter from :class:`ParallelGrid` to the model-parallel-unit protocol of DeepSpeed."""

    def __init__(self, grid: ParallelGrid) -> None:
        self._grid = grid

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._grid.model.group

    def get_model_parallel_world_size(self) -> int:
        return self._grid.model.size

    def get_model_parallel_rank(self) -> int:
        return self._grid.model.rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._grid.replicas.group

    def get_data_parallel_world_size(self) -> int:
        return self._grid.replicas.size

    def get_data_parallel_rank(self) -> int:
        return self._grid.replicas.rank

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._grid.replicas.group)

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._grid.tensor.group

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._grid.tensor.size

    def get_tensor_model_parallel_rank(self) -> int:
        return self._grid.tensor.rank

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_process_group_ranks(self._grid.tensor.group)[0]

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._grid.pipeline.group

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._grid.pipeline.size

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._grid.pipeline.rank
