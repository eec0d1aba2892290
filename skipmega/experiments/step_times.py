"""Time, memory, communication and balance of training steps, measured on the grid of this world."""

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from skipmega.config import DataSource, RunConfig, resolve_grid, resolve_vocabulary
from skipmega.data.order.batches import TokenBatch, make_loader, number_documents
from skipmega.data.order.datasets import build_datasets
from skipmega.experiments.step_plan import StepPlan, missing_models, step_config
from skipmega.launch.run import resolve
from skipmega.launch.run_folder import RunFolder
from skipmega.models.flops import training_flops_per_token
from skipmega.parallel.grid import ParallelGrid
from skipmega.training.engine import TrainingEngine
from skipmega.training.metrics import TERA, executed_shares, peak_memory_gib
from skipmega.training.sums import Averages, StepSums, average


def measure_grid(path: Path, plan: StepPlan, name: str, grid: ParallelGrid, output: Path) -> None:
    """Measure every missing model on this world's ``grid``; all its processes call it together."""
    for model in missing_models(plan, name, output):
        dist.barrier()  # nobody reads what is missing while the first process already writes
        config = step_config(path, plan, name, model)
        config, batches = _prepared(config, plan, grid)
        measured = measure_steps(config, batches, plan.train_steps, plan.timed_steps, grid)
        record = {"grid": name, "model": model, **measured}
        gc.collect()
        if grid.device.type == "cuda":
            torch.cuda.empty_cache()
        if grid.rank == 0:
            print(json.dumps(record), flush=True)
            with (output / "steps.jsonl").open("a") as stream:
                stream.write(json.dumps(record) + "\n")


def measure_steps(
    config: RunConfig, batches: Iterator[TokenBatch], train_steps: int, timed_steps: int, grid: ParallelGrid
) -> dict[str, Any]:
    """Train ``train_steps`` steps that count nothing, then measure ``timed_steps``.

    Args:
        config: resolved for this grid.
        batches: this data rank's micro-batches.
        train_steps: for compilation, and routers that have learnt something.
        timed_steps: at least one.
        grid: this process's place; all its processes call it together.
    """
    if grid.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(grid.device)
    begun = time.perf_counter()
    engine = TrainingEngine(config, grid)

    def train(steps: range) -> tuple[list[float], Averages]:
        times, sums = [], StepSums.zeros(config, grid)
        for step in steps:
            start = now(grid.device)
            engine.train_step(batches, step, config.optimizer.learning_rate, sums)
            times.append(now(grid.device) - start)
        return times, average(sums, config, grid)

    train(range(train_steps))
    ready = time.perf_counter() - begun
    times, seen = train(range(train_steps, train_steps + timed_steps))
    seconds = slowest(statistics.median(times), grid)
    tokens = config.training.global_batch_size * config.data.sequence_length
    flops = tokens * training_flops_per_token(config, executed_shares(config, seen))
    communication = _communication_seconds(grid.device, lambda: train(range(train_steps, train_steps + 1)))
    engine.close()
    return {
        "seconds_per_step": seconds,
        "fastest": min(times),
        "slowest": max(times),
        "flops_per_step": flops,
        "tokens_per_second_per_device": tokens / seconds / grid.world_size,
        "executed_tflops_per_device": flops / seconds / grid.world_size / TERA,
        "communication_seconds": communication,
        "peak_memory_gib": slowest(peak_memory_gib(grid.device), grid),
        "stage_seconds": seen.stage_seconds,
        "ready_after_seconds": ready,
        "loss": seen.loss,
        **_balance(config, seen),
    }


def _balance(config: RunConfig, seen: Averages) -> dict[str, float]:
    """Means over the routed layers."""
    layers = config.routed_layers
    if not layers:
        return {}

    def mean(values: list[float]) -> float:
        return sum(values[layer] for layer in layers) / len(layers)

    executed = mean(seen.executed)
    return {
        "executed": executed,
        "rank_imbalance": mean(seen.fullest_rank) / executed if executed else 1.0,
        "moved": mean(seen.moved) / executed if executed else 0.0,
    }


def _prepared(
    config: RunConfig, plan: StepPlan, grid: ParallelGrid
) -> tuple[RunConfig, Iterator[TokenBatch]]:
    """The resolved configuration, and micro-batches of random tokens or of this data rank's own shard."""
    if not plan.shards:
        config = resolve_grid(resolve_vocabulary(config, None), grid.world_size)
        return config, random_batches(config, grid)
    config, tokenizer = resolve(config, grid.world_size)
    needed = (plan.train_steps + plan.timed_steps + 1) * config.training.global_batch_size
    shards = []
    for path in plan.shards:
        data = config.data.model_copy(update={"train": [DataSource(path=path)]})
        built = build_datasets(
            data,
            tokenizer,
            num_train_samples=needed,
            num_valid_samples=0,
            seed=config.training.seed,
            index_cache=RunFolder(config).index_cache,
        )
        shards.append(built.train)
    return config, make_loader(
        shards[grid.data.rank % len(shards)],
        consumed_samples=0,
        total_samples=needed,
        micro_batch_size=config.training.micro_batch_size,
        dp_rank=0,
        dp_size=1,
        document_end=None if config.data.attend_across_documents else tokenizer.eod_id,
        num_workers=0,
        pin_memory=grid.device.type == "cuda",
    )


def random_batches(config: RunConfig, grid: ParallelGrid) -> Iterator[TokenBatch]:
    """Uniformly drawn tokens, a document end every thousand or so."""
    size, length = config.training.micro_batch_size, config.data.sequence_length
    generator = torch.Generator().manual_seed(grid.data.rank)
    first = 0
    while True:
        rows = torch.randint(1, config.vocab_size, (size, length + 1), generator=generator)
        rows[torch.rand(rows.shape, generator=generator) < 1e-3] = 0
        tokens = rows[:, :-1].contiguous()
        yield TokenBatch(
            tokens=tokens,
            labels=rows[:, 1:].contiguous(),
            loss_mask=torch.ones(size, length),
            sample_ids=torch.arange(first, first + size),
            document_ids=None if config.data.attend_across_documents else number_documents(tokens, 0),
        )
        first += size


def _communication_seconds(device: torch.device, step: Callable[[], Any]) -> float | None:
    """Time of this process's communication kernels in a step, their waiting included; None without a GPU."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize(device)
    return sum(e.self_device_time_total for e in seen.key_averages() if "nccl" in e.key.lower()) / 1e6


def now(device: torch.device) -> float:
    """Seconds on a clock, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def slowest(number: float, grid: ParallelGrid) -> float:
    """The largest ``number`` of any process."""
    largest = torch.tensor([number], dtype=torch.float64, device=grid.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()
