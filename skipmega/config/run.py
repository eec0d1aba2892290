"""The configuration of one run: all sections, and the rules that span them."""

import math

from pydantic import Field

from skipmega.config.base import Section
from skipmega.config.routing import DensityRamp, RoutingConfig
from skipmega.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainingConfig,
)
from skipmega.errors import ConfigError


class RunConfig(Section):
    """Everything that defines a run. ``run_dir`` holds its logs and checkpoints."""

    run_dir: str = "runs/default"
    model: ModelConfig = Field(default_factory=ModelConfig)
    routing: RoutingConfig = Field(default_factory=RoutingConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)

    @property
    def vocab_size(self) -> int:
        """The padded vocabulary; only a resolved config (:func:`resolve_vocabulary`) has one."""
        if self.model.vocab_size is None:
            raise ConfigError(
                "model.vocab_size is not set and no tokenizer has been read: give data.tokenizer or "
                "model.vocab_size"
            )
        return self.model.vocab_size

    @property
    def routed_layers(self) -> list[int]:
        """Global numbers (0-based) of the layers that have a router, ascending."""
        routing = self.routing
        if routing.router == "always":
            return []
        return list(range(routing.dense_first, self.model.num_layers - routing.dense_last, routing.every))

    def layer_is_routed(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` (0-based, global) has a router."""
        return layer in self.routed_layers

    @property
    def densities(self) -> dict[int, float]:
        """Target density by routed layer; 1 for highway, which runs everybody, and 0 for never."""
        fixed = {"highway": 1.0, "never": 0.0}.get(self.routing.router)
        return _spread(self.routing.density if fixed is None else fixed, self.routed_layers)

    @property
    def eval_densities(self) -> dict[int, float] | None:
        """Density of evaluation by routed layer; None as trained."""
        wanted = self.routing.eval_density
        return None if wanted is None else _spread(wanted, self.routed_layers)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one optimizer step on each data-parallel rank (needs a resolved grid)."""
        replicas = self.parallel.data_parallel or 1
        return self.training.global_batch_size // (self.training.micro_batch_size * replicas)


def _spread(density: float | list[float] | DensityRamp, layers: list[int]) -> dict[int, float]:
    if isinstance(density, DensityRamp):
        steps = max(len(layers) - 1, 1)
        values = [density.first + (density.last - density.first) * i / steps for i in range(len(layers))]
    elif isinstance(density, list):
        values = density
    else:
        values = [density] * len(layers)
    return dict(zip(layers, values, strict=True))


def resolve_vocabulary(config: RunConfig, tokenizer_size: int | None) -> RunConfig:
    """Return ``config`` with ``model.vocab_size`` set and padded.

    Args:
        config: the run's configuration.
        tokenizer_size: number of ids of the tokenizer, or None when there is no tokenizer.

    Raises:
        ConfigError: the given ``model.vocab_size`` is smaller than the tokenizer.
    """
    given, multiple = config.model.vocab_size, config.model.vocab_multiple
    if given is None and tokenizer_size is None:
        raise ConfigError("model.vocab_size is not set: give it, or data.tokenizer to take it from")
    size = given if given is not None else tokenizer_size
    assert size is not None
    if tokenizer_size is not None and size < tokenizer_size:
        raise ConfigError(
            f"model.vocab_size={size} is smaller than the tokenizer's {tokenizer_size} ids "
            f"({config.data.tokenizer}): raise it, or leave it out to take the tokenizer's"
        )
    padded = -(-size // multiple) * multiple
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": padded})})


def resolve_grid(config: RunConfig, world_size: int) -> RunConfig:
    """Check that the run fits on ``world_size`` processes; return ``config`` with ``data_parallel`` set.

    Called before any process group exists.

    Raises:
        ConfigError: a combination that cannot run; the message names fields, values and the mend.
    """
    parallel, model, training = config.parallel, config.model, config.training
    tensor, each = parallel.tensor_parallel, parallel.processes_per_replica
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
    per_step = training.micro_batch_size * replicas
    if training.global_batch_size % per_step:
        raise ConfigError(
            f"training.global_batch_size={training.global_batch_size} is not a multiple of "
            f"training.micro_batch_size={training.micro_batch_size} x {replicas} data-parallel ranks: "
            f"use a multiple of {per_step}"
        )
    if training.eval_sequences % per_step:
        raise ConfigError(
            f"training.eval_sequences={training.eval_sequences} is not a multiple of "
            f"training.micro_batch_size={training.micro_batch_size} x {replicas} data-parallel ranks: "
            f"use a multiple of {per_step}"
        )
    if parallel.chunks_per_stage > 1:
        for name in ("global_batch_size", "eval_sequences"):
            micro_batches = getattr(training, name) // per_step
            if micro_batches % parallel.pipeline_parallel:
                raise ConfigError(
                    f"training.{name}={getattr(training, name)} makes {micro_batches} micro-batches on each "
                    f"data-parallel rank, and parallel.chunks_per_stage={parallel.chunks_per_stage} runs "
                    f"them by {parallel.pipeline_parallel} (parallel.pipeline_parallel): use a multiple of "
                    f"{per_step * parallel.pipeline_parallel}, or chunks_per_stage=1"
                )
    return config.model_copy(update={"parallel": parallel.model_copy(update={"data_parallel": replicas})})


def check_consistency(config: RunConfig) -> None:
    """Refuse combinations across sections that no grid could run.

    Raises:
        ConfigError: names the fields, the values and the mend.
    """
    routing, model, training = config.routing, config.model, config.training
    if routing.router != "always" and routing.dense_first + routing.dense_last >= model.num_layers:
        raise ConfigError(
            f"routing.dense_first={routing.dense_first} and routing.dense_last={routing.dense_last} leave "
            f"none of model.num_layers={model.num_layers} layers to route: lower them, or set "
            "routing.router=always for a dense model"
        )
    for name, density in (("density", routing.density), ("eval_density", routing.eval_density)):
        if isinstance(density, list) and len(density) != len(config.routed_layers):
            raise ConfigError(
                f"routing.{name} lists {len(density)} shares, but {len(config.routed_layers)} layers are "
                f"routed ({config.routed_layers}): give one per routed layer, one number, or a ramp"
            )
    if routing.density_warmup_steps > training.steps:
        raise ConfigError(
            f"routing.density_warmup_steps={routing.density_warmup_steps} lies beyond training.steps="
            f"{training.steps}: the target density would never be reached; lower it"
        )
    group, length = routing.group_size, config.data.sequence_length
    if group is not None and length % group:
        raise ConfigError(
            f"routing.group_size={group} does not divide data.sequence_length={length}: groups lie within "
            "one sequence, choose a divisor or leave it out for the whole sequence"
        )
    if routing.eval_capacity_factor is not None and group is None:
        raise ConfigError(
            f"routing.eval_capacity_factor={routing.eval_capacity_factor} needs routing.group_size: with "
            "whole sequences as groups the capacity would change with the length of a text; set group_size, "
            "or leave eval_capacity_factor out (dropless)"
        )
    if training.compile and _packs(routing) and routing.capacity_factor is None:
        raise ConfigError(
            "training.compile=true needs fixed shapes, and routing.capacity_factor=null (dropless) has none: "
            "set routing.capacity_factor (1.25, say), or training.compile=false"
        )
    if training.cuda_graphs and not training.compile:
        raise ConfigError("training.cuda_graphs=true captures compiled layers: set training.compile=true too")
    if training.stop_after is not None and training.stop_after > training.steps:
        raise ConfigError(
            f"training.stop_after={training.stop_after} lies beyond training.steps={training.steps}: "
            "lower it or leave it out"
        )
    if sum(config.data.split) <= 0 or min(config.data.split) < 0:
        raise ConfigError(f"data.split={config.data.split} must be two weights >= 0 with a positive sum")


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


def _packs(routing: RoutingConfig) -> bool:
    """Whether the number of packed rows hangs on the capacity (top-k has its own)."""
    return routing.router not in ("always", "topk") and not routing.computes_all


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
