"""Typed configuration: sections, the rules across them, YAML files and overrides."""

from skipmega.config.consistency import check_consistency
from skipmega.config.data import DataConfig, DataSource, MixtureStage
from skipmega.config.fit import resolve_grid
from skipmega.config.loader import build_config, dump_config, load_config, load_model, parse_override
from skipmega.config.routing import DensityRamp, RoutingConfig
from skipmega.config.run import RunConfig, resolve_vocabulary
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

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DataSource",
    "DensityRamp",
    "EvaluationConfig",
    "LoggingConfig",
    "MixtureStage",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RoutingConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainingConfig",
    "build_config",
    "check_consistency",
    "dump_config",
    "load_config",
    "load_model",
    "parse_override",
    "resolve_grid",
    "resolve_vocabulary",
]
