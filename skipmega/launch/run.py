"""One pre-training run from configuration to last checkpoint: the composition of all rooms."""

import dataclasses
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import deepspeed
import megatron.core
import torch
import torch.distributed as dist

import skipmega
from skipmega.checkpoint.saver import CheckpointSaver
from skipmega.checkpoint.store import Checkpoint
from skipmega.config import RunConfig, resolve_grid, resolve_vocabulary
from skipmega.data.order.batches import SampleSource, TokenBatch, make_loader
from skipmega.data.order.datasets import RunDatasets, build_datasets
from skipmega.data.order.streams import build_streams
from skipmega.data.ranks import on_rank_0
from skipmega.data.tokenizer import Tokenizer
from skipmega.errors import CheckpointDamagedError, CheckpointError, ConfigError
from skipmega.launch.backends import describe_kernels
from skipmega.launch.live_tasks import LiveTasks, check_tasks
from skipmega.launch.run_folder import RunFolder
from skipmega.models.flops import count_parameters, training_flops_per_token
from skipmega.models.stages import cut_stages, stage_costs
from skipmega.parallel.grid import ParallelGrid, create_grid, end_communication
from skipmega.parallel.process import ProcessInfo
from skipmega.training.energy import describe_energy
from skipmega.training.engine import TrainingEngine
from skipmega.training.loop import HeldOut, Progress, TrainingLoop
from skipmega.training.optimizers import updates_done
from skipmega.training.sinks import Sink, open_sinks
from skipmega.training.state import HostBuffers, collect_state, restore_state
from skipmega.training.stopping import StopRequests
from skipmega.training.watchdog import Watchdog


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
    folder.check()
    if config.evaluation.interval:
        check_tasks(config.evaluation)
    stops = StopRequests(folder.stop_file if process.rank == 0 else None, config.training.max_duration)
    stops.listen()
    try:
        _pretrain(config, tokenizer, folder, process, stops)
    finally:
        stops.ignore()


def _pretrain(
    config: RunConfig, tokenizer: Tokenizer, folder: RunFolder, process: ProcessInfo, stops: StopRequests
) -> None:
    grid = create_grid(process, config.parallel)
    data = build_data(config, tokenizer)
    on_rank_0(lambda: folder.check_data(data.fingerprint))
    engine = TrainingEngine(config, grid)
    attempt = claim(folder, grid)
    progress, origin = resume(engine, grid, folder)
    if grid.rank == 0 and data.plan is not None:
        print(data.plan)
    sinks = _start_records(engine, folder, progress, attempt, origin) if grid.rank == 0 else []
    if grid.rank == 0:
        folder.record_data(data.fingerprint)
    held_out = _held_out_readers(config, grid, data, tokenizer)
    live = LiveTasks(engine, tokenizer)
    with Watchdog(
        folder.heartbeats(attempt), grid.rank, grid.world_size, 60 * config.training.hang_minutes
    ) as watchdog:
        loop = TrainingLoop(
            config,
            engine,
            train_batches=_train_batches(config, grid, data.train, tokenizer, progress.consumed_samples),
            held_out=held_out,
            progress=progress,
            sinks=sinks,
            saver=RunSaver(engine, folder, attempt),
            stops=stops,
            check_owned=lambda: folder.check_owned(attempt) if grid.rank == 0 else None,
            go_back=lambda: resume(engine, grid, folder)[1],
            beat=watchdog.beat,
            ask_tasks=partial(live.ask, watchdog.beat) if config.evaluation.interval else None,
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
    train, valid = (
        training.steps * training.global_batch_size,
        training.eval_sequences if training.eval_interval else 0,
    )
    if config.data.order == "stream":
        return build_streams(
            config.data, tokenizer, num_train_samples=train, num_valid_samples=valid, seed=training.seed
        )
    return build_datasets(
        config.data,
        tokenizer,
        num_train_samples=train,
        num_valid_samples=valid,
        seed=training.seed,
        index_cache=index_cache(config),
    )


def index_cache(config: RunConfig) -> Path:
    """Folder of a run's sample indices."""
    return Path(config.data.index_cache or RunFolder(config).index_cache)


def claim(folder: RunFolder, grid: ParallelGrid) -> int:
    """Make this attempt the one that owns the run; returns its number. All processes call it together.

    Raises:
        CheckpointError: the run folder cannot be written.
    """
    outcome: list[int | str] = [0]
    if grid.rank == 0:
        try:
            outcome = [folder.claim_attempt()]
        except CheckpointError as error:
            outcome = [str(error)]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], str):
        raise CheckpointError(outcome[0])
    return outcome[0]


def resume(engine: TrainingEngine, grid: ParallelGrid, folder: RunFolder) -> tuple[Progress, Path | None]:
    """Put the newest sound checkpoint's state into a fresh engine; all processes call it together.

    Returns:
        How far it was, and its path; the beginning and None if there is no checkpoint.

    Raises:
        CheckpointError: there are checkpoints and all of them are damaged, or one does not fit.
    """
    candidates = [folder.candidates()] if grid.rank == 0 else [[]]
    dist.broadcast_object_list(candidates, src=0)
    damaged: list[str] = []
    for checkpoint in candidates[0]:
        try:
            return _restore(engine, grid, checkpoint), checkpoint.path
        except CheckpointDamagedError as error:
            damaged.append(str(error))
            if grid.rank == 0:
                print(f"warning: {error}", file=sys.stderr, flush=True)
    if damaged:
        raise CheckpointError(
            f"no checkpoint of run_dir={folder.path} is sound: {damaged[0]}; mend it, give another run_dir "
            "with checkpoint.resume=PATH, or remove them to start from the beginning"
        )
    return Progress(), None


def _restore(engine: TrainingEngine, grid: ParallelGrid, checkpoint: Checkpoint) -> Progress:
    tensors = collect_state(engine)
    checkpoint.read_into(tensors, grid)
    state = checkpoint.state
    restore_state(engine, state["optimizer_updates"], tensors)
    fields = [field.name for field in dataclasses.fields(Progress)]
    return Progress(**{name: state[name] for name in fields if name in state})


class RunSaver:
    """Saves an engine's state into the run's folder; making one is collective, as are its methods.

    Args:
        engine: whose state.
        folder: where to.
        attempt: number of the attempt that owns the run.
    """

    def __init__(self, engine: TrainingEngine, folder: RunFolder, attempt: int) -> None:
        self._engine, self._attempt = engine, attempt
        self._buffers = HostBuffers(engine.grid.device)
        self.files = CheckpointSaver(
            folder.store, engine.grid, engine.config, attempt, lambda: folder.check_owned(attempt)
        )

    @property
    def failed(self) -> bool:
        """As :attr:`CheckpointSaver.failed`."""
        return self.files.failed

    def begin(self, progress: Progress) -> None:
        """As :meth:`CheckpointSaver.begin`."""
        state = {
            **dataclasses.asdict(progress),
            "attempt": self._attempt,
            "optimizer_updates": updates_done(self._engine.optimizer),
            "versions": versions(),
        }
        self.files.begin(state, lambda: self._buffers.take_share(self._engine))

    def wait(self) -> None:
        """As :meth:`CheckpointSaver.wait`."""
        self.files.wait()


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
    engine: TrainingEngine, folder: RunFolder, progress: Progress, attempt: int, origin: Path | None
) -> list[Sink]:
    """Make this a run: its folder's files, its sinks, and a word on what starts; on the first process."""
    config = engine.config
    folder.begin_records(progress.step)
    parameters, dense = count_parameters(config), training_flops_per_token(config) / 1e9
    print(f"grid: {engine.grid.describe()}")
    print(f"kernels: {describe_kernels(config, engine.grid.device)}")
    print(f"energy: {describe_energy(engine.grid.device)}")
    print(f"model: {parameters / 1e6:.1f}M parameters, {dense:.3g} GFLOPs per token if dense")
    if engine.grid.pipeline.size > 1:
        costs = stage_costs(config)
        shares = ", ".join(
            f"{'+'.join(str(len(chunk)) for chunk in chunks)} layers {cost / sum(costs):.0%}"
            for chunks, cost in zip(cut_stages(config), costs, strict=True)
        )
        dearest = max(costs) * len(costs) / sum(costs)
        print(f"stages: {shares} of the operations, the dearest {dearest:.2f} times the mean")
    print(f"run: {config.run_dir}, attempt {attempt}, from {origin or 'the beginning'}", flush=True)
    sinks = open_sinks(config)
    for sink in sinks:
        sink.write({"kind": "start", "step": progress.step, "attempt": attempt})
    return sinks


def _train_batches(
    config: RunConfig, grid: ParallelGrid, samples: SampleSource, tokenizer: Tokenizer, consumed: int
) -> Iterator[TokenBatch]:
    total = config.training.steps * config.training.global_batch_size
    return _batches(config, grid, samples, tokenizer, consumed, total, config.data.num_workers)


def _held_out_readers(
    config: RunConfig, grid: ParallelGrid, data: RunDatasets, tokenizer: Tokenizer
) -> HeldOut | None:
    """What reads the held-out samples, of all sources and of each; None where there are none."""

    def reader(samples: SampleSource) -> Callable[[], Iterator[TokenBatch]]:
        return lambda: _batches(config, grid, samples, tokenizer, 0, config.training.eval_sequences, 0)

    if data.valid is None:
        return None
    return HeldOut(reader(data.valid), {name: reader(each) for name, each in data.valid_sources.items()})


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
