"""The configuration of one run: all sections, and what follows from them."""

from pydantic import Field

from skipmega.config.base import Section
from skipmega.config.data import DataConfig
from skipmega.config.routing import DensityRamp, RoutingConfig
from skipmega.config.sections import (
    CheckpointConfig,
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
