"""A tiny run, trained for a few steps on any grid, and what it produced in logical (grid-free) form."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch.nn import functional

from skipmega.config import ParallelConfig, RunConfig, build_config, resolve_grid, resolve_vocabulary
from skipmega.data.order.batches import TokenBatch
from skipmega.kernels.attention import document_starts
from skipmega.launch.environment import discover_process
from skipmega.models.decoder import DecoderStage
from skipmega.models.layer import LayerContext
from skipmega.parallel.grid import ParallelGrid, create_grid, release_grid
from skipmega.parallel.logical import partition_dim
from skipmega.routing.noise import NoiseKey
from skipmega.routing.state import RoutingState
from skipmega.training.engine import TrainingEngine, deepspeed_config
from skipmega.training.sums import StepSums, average

SAMPLES_PER_MICRO_STEP = 4
GLOBAL_BATCH = 8
LENGTH = 64
VOCABULARY = 128


def tiny_config(overrides: dict[str, dict[str, Any]] | None = None) -> RunConfig:
    """Four layers, the middle two routed, trained on :func:`tiny_batches`."""
    values: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "ffn_hidden_size": 64,
            "vocab_size": VOCABULARY,
            "init_std": 0.2,
        },
        "routing": {"router": "gumbel", "density_loss_weight": 1.0, "group_size": 8, "capacity_factor": 1.1},
        "data": {"sequence_length": LENGTH},
        "training": {
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": SAMPLES_PER_MICRO_STEP,
            "eval_sequences": GLOBAL_BATCH,
        },
        # Adam divides a gradient of nearly zero by nearly zero: a larger epsilon tames the rounding
        "optimizer": {"gradient_clip": 0.5, "epsilon": 1e-5},
    }
    for section, fields in (overrides or {}).items():
        values[section] = {**values.get(section, {}), **fields}
    return build_config(values, source="tiny_config")


def tiny_batches(config: RunConfig, grid: ParallelGrid, first_sample: int = 0) -> Iterator[TokenBatch]:
    """Random documents by sample number, cut over data ranks as the real loader does."""
    size, replicas, sample = config.training.micro_batch_size, grid.data.size, first_sample
    length = config.data.sequence_length
    while True:
        mine = [sample + grid.data.rank * size + i for i in range(size)]
        rows = torch.stack([_sample(number, length) for number in mine])
        ends = (rows[:, :-1] == 2).long()
        yield TokenBatch(
            tokens=rows[:, :-1],
            labels=rows[:, 1:],
            loss_mask=torch.ones(size, length),
            sample_ids=torch.tensor(mine),
            document_ids=ends.cumsum(1) - ends,
        )
        sample += size * replicas


@contextmanager
def tiny_grid(parallel: dict[str, Any]) -> Iterator[ParallelGrid]:
    """The grid of this world that the section says, released in the end. Costs: gloo keeps some threads."""
    linear = functional.linear
    yield create_grid(discover_process(), ParallelConfig(**parallel))
    release_grid()
    functional.linear = linear  # which ZeRO 3 replaces for good


def make_engine(config: RunConfig, grid: ParallelGrid) -> TrainingEngine:
    """An engine whose ZeRO 3 leaves no parameter whole, however small, and keeps none until its next use."""

    def settings(config: RunConfig) -> dict[str, Any]:
        values = deepspeed_config(config)
        if config.parallel.zero_stage == 3:
            values["zero_optimization"].update(
                stage3_param_persistence_threshold=0,
                stage3_max_reuse_distance=0,
                stage3_prefetch_bucket_size=3000,
            )
        return values

    with patch("skipmega.training.engine.deepspeed_config", settings):
        return TrainingEngine(config, grid)


def train_tiny(
    grid: ParallelGrid,
    parallel: dict[str, Any],
    steps: int,
    overrides: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train on ``grid``, which is :func:`tiny_grid` of ``parallel``; every rank returns the same results.

    A micro-batch over all data ranks is the same on every grid, or with ``training.micro_batch_size`` given
    that of each data rank.

    Returns losses and grad-norms per step, the gradients of the first and last step and the fp32 weights
    before the last one and at the end by logical name, what was seen per step, the held-out averages and the
    routing state; ``parameters_kept`` says whether any is whole on this rank between steps,
    ``same_micro_batches`` whether each is one of a single process, ``same_rows`` whether none is cut either.
    """
    config = tiny_config({**(overrides or {}), "parallel": parallel})
    replicas = grid.data.size
    size = (overrides or {}).get("training", {}).get("micro_batch_size")
    rate = (overrides or {}).get("optimizer", {}).get("learning_rate", 0.01)
    training = config.training.model_copy(
        update={"micro_batch_size": size or SAMPLES_PER_MICRO_STEP // replicas}
    )
    config = config.model_copy(update={"training": training})
    config = resolve_grid(resolve_vocabulary(config, None), grid.world_size)
    torch.manual_seed(grid.rank)
    engine = make_engine(config, grid)
    running = len(FWD_MODULE_STACK)
    batches = tiny_batches(config, grid)
    losses, norms, seen = [], [], []
    gradients: list[dict[str, torch.Tensor]] = []
    weights: list[dict[str, torch.Tensor]] = []
    for step in range(steps):
        sums = StepSums.zeros(config, grid)
        if step == steps - 1:
            weights.append(gather_logical(engine, grid, safe_get_full_fp32_param))
        engine.accumulate_gradients(batches, step, sums)
        if step in (0, steps - 1):
            gradients.append(gather_logical(engine, grid, safe_get_full_grad))
        norms.append(float(engine.apply_gradients(step, rate)))
        kept = any(parameter.numel() for parameter in engine.stage.parameters())
        seen.append(average(sums, config, grid))
        losses.append(seen[-1].loss)
    held_out = engine.evaluate(tiny_batches(config, grid, first_sample=1000), config.micro_batches, steps)
    weights.append(gather_logical(engine, grid, safe_get_full_fp32_param))
    state = gather_state(engine, grid)
    engine.close()
    assert len(FWD_MODULE_STACK) == running, "ZeRO 3 takes modules that have run for running"
    same_micro_batches = replicas == 1 or size is not None
    return {
        "losses": losses, "norms": norms, "gradients": gradients[0], "last_gradients": gradients[-1],
        "weights": weights[-1], "last_weights": weights[0], "state": state, "seen": seen,
        "held_out": held_out, "parameters_kept": kept,
        "same_micro_batches": same_micro_batches,
        "same_rows": same_micro_batches and config.parallel.sequence_shards == 1,
    }  # fmt: skip


def plain_step(
    overrides: dict[str, dict[str, Any]] | None = None,
    step: int = 0,
    weights: dict[str, torch.Tensor] | None = None,
    coefficients: list[float] | None = None,
) -> dict[str, Any]:
    """Loss, gradient norm and gradients of a step of :func:`train_tiny`, without DeepSpeed, megatron-core's
    schedule, attached losses or controllers: the objective written down, and autograd.

    Later steps need the weights before them and, with density_control=coefficient, each routed layer's
    factor of its density; no step of a router whose threshold moves can be had.
    """
    config = resolve_grid(resolve_vocabulary(tiny_config(overrides), None), 1)
    routing = config.routing
    grid = create_grid(discover_process())
    stage = DecoderStage(config, grid)
    stage.load_state_dict(weights or {}, strict=weights is not None)
    state = RoutingState(config, stage.routed_layers, grid.device)
    batches = tiny_batches(config, grid, first_sample=step * GLOBAL_BATCH)
    objective, losses = torch.zeros(()), []
    for _ in range(config.micro_batches):
        batch = next(batches)
        assert batch.document_ids is not None
        warmup = routing.density_warmup_steps
        warmed = min(1.0, math.floor(8 * step / warmup) / 8) if warmup else 1.0
        since = document_starts(batch.document_ids)
        context = LayerContext(since, routing.capacity_factor, warmed=warmed)
        key = NoiseKey(config.training.seed, batch.sample_ids)
        output = stage(batch.tokens, context, state.for_training(step, key, torch.arange(LENGTH)))
        logits = stage.logits(output.hidden).transpose(0, 1)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        losses.append(loss.item())
        for i, record in enumerate(output.records.values()):
            density = record.chosen.mean()
            loss = loss + record.auxiliary
            if routing.control == "penalty":
                loss = loss + routing.density_loss_weight * (density - routing.density) ** 2
            elif routing.control == "coefficient" and coefficients is not None:
                loss = loss + coefficients[i] * density
        objective = objective + loss / config.micro_batches
    parameters = dict(stage.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(objective, list(parameters.values())), strict=True))
    release_grid()
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return {"loss": sum(losses) / len(losses), "norm": norm.item(), "gradients": gradients}


def gather_logical(engine: TrainingEngine, grid: ParallelGrid, read: Any) -> dict[str, torch.Tensor]:
    """Full tensors by logical name from every tensor rank and stage, on every rank."""
    local = {}
    for name, parameter in engine.stage.named_parameters():
        whole = read(parameter).detach().float()
        dim = partition_dim(parameter)
        if dim is not None and grid.tensor.size > 1:
            parts = [torch.empty_like(whole) for _ in range(grid.tensor.size)]
            dist.all_gather(parts, whole.contiguous(), group=grid.tensor.group)
            whole = torch.cat(parts, dim)
        local[name] = whole.cpu()
    return _of_all_stages(local, grid)


def gather_state(engine: TrainingEngine, grid: ParallelGrid) -> dict[str, torch.Tensor]:
    """What routing remembers of every layer, on every rank."""
    local = {name: tensor.clone().cpu() for name, tensor in engine.routing_tensors().items()}
    return _of_all_stages(local, grid)


def _of_all_stages(local: dict[str, torch.Tensor], grid: ParallelGrid) -> dict[str, torch.Tensor]:
    stages: list[dict[str, torch.Tensor]] = [{} for _ in range(grid.pipeline.size)]
    dist.all_gather_object(stages, local, group=grid.pipeline.group)
    return {name: value for stage in reversed(stages) for name, value in stage.items()}


def _sample(number: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, VOCABULARY, (length + 1,), generator=generator) % (VOCABULARY - 20)
