"""One pre-training run from configuration to last checkpoint: the composition of all rooms."""

import platform
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import megatron.core
import torch

import skipmega
from skipmega.checkpoint.store import Checkpoint
from skipmega.config import RunConfig, resolve_grid, resolve_vocabulary
from skipmega.data.batches import SampleSource, TokenBatch, make_loader
from skipmega.data.datasets import RunDatasets, build_datasets
from skipmega.data.tokenizer import Tokenizer
from skipmega.errors import ConfigError
from skipmega.launch.run_folder import RunFolder
from skipmega.models.flops import count_parameters, training_flops_per_token
from skipmega.models.stages import cut_stages, stage_costs
from skipmega.parallel.grid import ParallelGrid, create_grid, end_communication
from skipmega.parallel.process import ProcessInfo
from skipmega.training.engine import TrainingEngine
from skipmega.training.loop import Progress, TrainingLoop
from skipmega.training.optimizers import updates_done
from skipmega.training.sinks import Sink, open_sinks
from skipmega.training.state import collect_state, restore_state


def pretrain(config: RunConfig, process: ProcessInfo) -> None:
    """Train until ``training.steps`` or ``training.stop_after``, resuming if the run folder says so.

    What the configuration and the run folder alone show is refused before a process group exists; the
    run's own files are written once nothing is left to refuse, so that a start that failed leaves no run
    behind.

    Raises:
        SkipmegaError: what the user can mend, the same on every process.
    """
    config, tokenizer = resolve(config, process.world_size)
    folder = RunFolder(config)
    checkpoint = folder.check()
    grid = create_grid(process, config.parallel)
    data = build_data(config, tokenizer)
    engine = TrainingEngine(config, grid)
    progress = Progress()
    if checkpoint is not None:
        progress = resume(engine, grid, checkpoint)
    sinks = _start_records(engine, folder, progress, checkpoint) if grid.rank == 0 else []
    held_out = data.valid
    loop = TrainingLoop(
        config,
        engine,
        train_batches=_train_batches(config, grid, data.train, tokenizer, progress.consumed_samples),
        held_out=None if held_out is None else lambda: _held_out_batches(config, grid, held_out, tokenizer),
        progress=progress,
        sinks=sinks,
        save=lambda now: save(engine, grid, folder, now),
    )
    loop.run()
    for sink in sinks:
        sink.close()
    end_communication()


def resolve(config: RunConfig, world_size: int) -> tuple[RunConfig, Tokenizer]:
    """The configuration with vocabulary and grid filled in and checked, and its tokenizer.

    Raises:
        ConfigError: no tokenizer is named, or the grid does not fit.
        DataError: the tokenizer cannot be read.
    """
    if config.data.tokenizer is None:
        raise ConfigError("data.tokenizer is not set: give the sentencepiece model the data was made with")
    tokenizer = Tokenizer.load(config.data.tokenizer)
    config = resolve_grid(resolve_vocabulary(config, tokenizer.size), world_size)
    cut_stages(config)
    return config, tokenizer


def build_data(config: RunConfig, tokenizer: Tokenizer) -> RunDatasets:
    """The run's training and held-out samples; all processes call it together."""
    training = config.training
    return build_datasets(
        config.data,
        tokenizer,
        num_train_samples=training.steps * training.global_batch_size,
        num_valid_samples=training.eval_sequences if training.eval_interval else 0,
        seed=training.seed,
        index_cache=config.data.index_cache or RunFolder(config).index_cache,
    )


def resume(engine: TrainingEngine, grid: ParallelGrid, checkpoint: Checkpoint) -> Progress:
    """Put a checkpoint's state into a fresh engine; returns how far it was."""
    state = checkpoint.state
    restore_state(engine, state["optimizer_updates"], lambda tensors: checkpoint.read_into(tensors, grid))
    return Progress(step=state["step"], consumed_samples=state["consumed_samples"])


def save(engine: TrainingEngine, grid: ParallelGrid, folder: RunFolder, progress: Progress) -> Path:
    """Write a checkpoint of the present state; all processes call it together."""
    state = {
        "step": progress.step,
        "consumed_samples": progress.consumed_samples,
        "optimizer_updates": updates_done(engine.optimizer),
        "versions": versions(),
    }
    return folder.store.save(grid, engine.config, state, collect_state(engine))


def versions() -> dict[str, str]:
    """Versions that a run's arithmetic depends on."""
    return {
        "skipmega": skipmega.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "megatron-core": megatron.core.__version__,
    }


def _start_records(
    engine: TrainingEngine, folder: RunFolder, progress: Progress, checkpoint: Checkpoint | None
) -> list[Sink]:
    """Make this a run: its folder's files, its sinks, and a word on what starts; on the first process."""
    config = engine.config
    attempt = folder.start_attempt()
    parameters, dense = count_parameters(config), training_flops_per_token(config) / 1e9
    origin = checkpoint.path if checkpoint else "the beginning"
    print(f"grid: {engine.grid.describe()}; ZeRO {config.parallel.zero_stage}; attention: {engine.attention}")
    print(f"model: {parameters / 1e6:.1f}M parameters, {dense:.3g} GFLOPs per token if dense")
    if engine.grid.pipeline.size > 1:
        costs = stage_costs(config)
        shares = ", ".join(
            f"{'+'.join(str(len(chunk)) for chunk in chunks)} layers {cost / sum(costs):.0%}"
            for chunks, cost in zip(cut_stages(config), costs, strict=True)
        )
        dearest = max(costs) * len(costs) / sum(costs)
        print(f"stages: {shares} of the operations, the dearest {dearest:.2f} times the mean")
    print(f"run: {config.run_dir}, attempt {attempt}, from {origin}", flush=True)
    sinks = open_sinks(config)
    for sink in sinks:
        sink.write({"kind": "start", "step": progress.step, "attempt": attempt})
    return sinks


def _train_batches(
    config: RunConfig, grid: ParallelGrid, samples: SampleSource, tokenizer: Tokenizer, consumed: int
) -> Iterator[TokenBatch]:
    total = config.training.steps * config.training.global_batch_size
    return _batches(config, grid, samples, tokenizer, consumed, total, config.data.num_workers)


def _held_out_batches(
    config: RunConfig, grid: ParallelGrid, samples: SampleSource, tokenizer: Tokenizer
) -> Iterator[TokenBatch]:
    return _batches(config, grid, samples, tokenizer, 0, config.training.eval_sequences, 0)


def _batches(
    config: RunConfig,
    grid: ParallelGrid,
    samples: SampleSource,
    tokenizer: Tokenizer,
    consumed: int,
    total: int,
    workers: int,
) -> Iterator[TokenBatch]:
    return make_loader(
        samples,
        consumed_samples=consumed,
        total_samples=total,
        micro_batch_size=config.training.micro_batch_size,
        dp_rank=grid.data.rank,
        dp_size=grid.data.size,
        document_end=None if config.data.attend_across_documents else tokenizer.eod_id,
        num_workers=workers,
        pin_memory=grid.device.type == "cuda",
    )
