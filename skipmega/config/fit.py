"""Whether a run fits on a grid of processes."""

import math

from skipmega.config.run import RunConfig
from skipmega.errors import ConfigError


def resolve_grid(config: RunConfig, world_size: int) -> RunConfig:
    """Check that the run fits on ``world_size`` processes; return ``config`` with ``data_parallel`` set.

    Called before any process group exists.

    Raises:
        ConfigError: a combination that cannot run; the message names fields, values and the mend.
    """
    parallel, each = config.parallel, config.parallel.processes_per_replica
    _check_zero(config)
    _check_sequence_cut(config)
    _check_evaluation(config)
    if world_size % each:
        raise ConfigError(
            f"{world_size} processes cannot hold {parallel.describe_replica()}: start a multiple of {each} "
            "processes"
        )
    replicas = world_size // each
    if parallel.data_parallel not in (None, replicas):
        raise ConfigError(
            f"parallel.data_parallel={parallel.data_parallel} x {parallel.describe_replica()} is "
            f"{parallel.data_parallel * each} processes, but {world_size} were started: start that many, or "
            "leave parallel.data_parallel out"
        )
    _check_matrices(config)
    _check_batches(config, replicas)
    return config.model_copy(update={"parallel": parallel.model_copy(update={"data_parallel": replicas})})


def _check_matrices(config: RunConfig) -> None:
    """All are cut evenly over the tensor axis."""
    model, tensor = config.model, config.parallel.tensor_parallel
    for name, value in (
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.num_key_value_heads", model.kv_heads),
        ("model.ffn_hidden_size", model.ffn_size),
        ("model.vocab_size", config.vocab_size),
    ):
        if value % tensor:
            raise ConfigError(
                f"{name}={value} is not divisible by parallel.tensor_parallel={tensor}: change one of the two"
            )


def _check_batches(config: RunConfig, replicas: int) -> None:
    """Data ranks do the same number of micro-batches, in whole rounds where chunks take turns."""
    parallel, training = config.parallel, config.training
    per_step = training.micro_batch_size * replicas
    for name in ("global_batch_size", "eval_sequences"):
        sequences = getattr(training, name)
        if sequences % per_step:
            raise ConfigError(
                f"training.{name}={sequences} is not a multiple of training.micro_batch_size="
                f"{training.micro_batch_size} x {replicas} data-parallel ranks: use a multiple of {per_step}"
            )
        micro_batches = sequences // per_step
        if parallel.chunks_per_stage > 1 and micro_batches % parallel.pipeline_parallel:
            raise ConfigError(
                f"training.{name}={sequences} makes {micro_batches} micro-batches on each data-parallel "
                f"rank, and parallel.chunks_per_stage={parallel.chunks_per_stage} runs them by "
                f"{parallel.pipeline_parallel} (parallel.pipeline_parallel): use a multiple of "
                f"{per_step * parallel.pipeline_parallel}, or chunks_per_stage=1"
            )


def _check_evaluation(config: RunConfig) -> None:
    """Replicas answer different questions, each in passes of its own number and length."""
    parallel = config.parallel
    obstacles = {
        f"parallel.zero_stage={parallel.zero_stage}": parallel.zero_stage == 3,
        f"parallel.context_parallel={parallel.context_parallel}": parallel.context_parallel > 1,
        "parallel.sequence_parallel=true": parallel.sequence_parallel,
        f"parallel.chunks_per_stage={parallel.chunks_per_stage}": parallel.chunks_per_stage > 1,
        "routing.dispatch=balanced": config.routing.dispatch == "balanced",
    }
    found = [field for field, is_there in obstacles.items() if is_there]
    if config.evaluation.interval and found:
        raise ConfigError(
            f"evaluation.interval={config.evaluation.interval} asks tasks on the grid that trains, which "
            f"{' and '.join(found)} does not allow: set evaluation.interval=0 and evaluate checkpoints with "
            "tools/evaluate.py, on any grid"
        )


def _check_sequence_cut(config: RunConfig) -> None:
    """Sequences are cut into equal parts, none of which may cut a group of tokens that share slots."""
    parallel, routing, length = config.parallel, config.routing, config.data.sequence_length
    shards, context = parallel.sequence_shards, parallel.context_parallel
    if shards == 1:
        return
    cut = [f"parallel.context_parallel={context}"] * (context > 1)
    cut += [f"parallel.sequence_parallel=true with tensor_parallel={parallel.tensor_parallel}"] * (
        parallel.sequence_parallel
    )
    parts, cutters = math.lcm(shards, 2 * context if context > 1 else 1), " and ".join(cut)
    if length % parts:
        raise ConfigError(
            f"data.sequence_length={length} cannot be cut into {parts} parts, as {cutters} asks: use a "
            f"multiple of {parts}"
        )
    if not config.routed_layers:
        return
    if routing.keys_values == "executed":
        raise ConfigError(
            f"routing.keys_values=executed packs whole sequences, which are cut by {cutters}: use "
            "keys_values=all, or another grid"
        )
    group, part, ranks = routing.group_size, length // parts, routing.router == "topk"
    deals = ranks or (routing.capacity_factor is not None and routing.router not in ("highway", "never"))
    if deals if group is None else part % group:
        whole = "the whole sequence (routing.group_size is left out)"
        raise ConfigError(
            f"tokens share slots within {whole if group is None else f'routing.group_size={group}'}, "
            f"which is cut into parts of {part} by {cutters}: set routing.group_size to a divisor of {part}"
            + ("" if ranks else ", or leave it out with routing.capacity_factor=null")
        )


def _check_zero(config: RunConfig) -> None:
    parallel, training = config.parallel, config.training
    if parallel.zero_stage == 0:
        raise ConfigError(
            "parallel.zero_stage=0 is not supported: the step is that of DeepSpeed's ZeRO optimizer; use 1 "
            "(the same arithmetic, sharded optimizer states)"
        )
    if parallel.zero_stage != 3:
        return
    if parallel.pipeline_parallel > 1:
        raise ConfigError(
            f"parallel.zero_stage=3 with parallel.pipeline_parallel={parallel.pipeline_parallel} is not "
            "supported: stages gather parameters in different orders and wait for each other forever; use "
            "zero_stage 1 or 2, or pipeline_parallel=1"
        )
    if config.optimizer.name == "adafactor":
        raise ConfigError(
            "parallel.zero_stage=3 with optimizer.name=adafactor is not supported: it sums the rows and "
            "columns of matrices, and knows where their pieces lie with ZeRO 1 and 2 only; use zero_stage 1 "
            "or 2, or optimizer.name=adamw"
        )
    if training.compile:
        raise ConfigError(
            "parallel.zero_stage=3 with training.compile=true is not supported: torch fails to trace the "
            "hooks by which ZeRO 3 gathers weights, and they cut a layer into many programs; use zero_stage "
            "1 or 2, or training.compile=false"
        )
