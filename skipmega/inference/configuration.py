"""The configuration that a checkpoint is read with: another grid, another density."""

from skipmega.config import RunConfig, build_config, resolve_grid
from skipmega.parallel.grid import ParallelGrid


def with_eval_density(config: RunConfig, eval_density: float | None) -> RunConfig:
    """``config`` with another ``routing.eval_density``; None leaves it as it is.

    Raises:
        ConfigError: it is no density, or has no meaning for the router.
    """
    if eval_density is None:
        return config
    routing = config.routing.model_dump() | {"eval_density": eval_density}
    return build_config(config.model_dump() | {"routing": routing}, source=f"eval_density={eval_density}")


def on_grid(config: RunConfig, grid: ParallelGrid, precision: str) -> RunConfig:
    """The checkpoint's configuration with the present grid, whose batch arithmetic plays no role."""
    parallel = config.parallel.model_copy(
        update={
            "tensor_parallel": grid.tensor.size,
            "pipeline_parallel": grid.pipeline.size,
            "data_parallel": grid.data.size,
            "zero_stage": 1,
            "sequence_parallel": False,
            "context_parallel": 1,
            "chunks_per_stage": 1,
            "layers_per_stage": None,
        }
    )
    training = config.training.model_copy(
        update={
            "precision": precision,
            "micro_batch_size": 1,
            "global_batch_size": grid.data.size,
            "eval_sequences": grid.data.size,
        }
    )
    routing = config.routing.model_copy(update={"dispatch": "local"})  # replicas are independent
    changed = {"parallel": parallel, "training": training, "routing": routing}
    return resolve_grid(config.model_copy(update=changed), grid.world_size)
