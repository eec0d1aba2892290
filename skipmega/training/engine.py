"""One training step: megatron-core's schedule over the stage inside DeepSpeed's gradient coalescing.

The seam (verified against plain torch by the grid-parity tests): the schedule runs on the raw module,
gradients pile up in ``param.grad`` over the micro-batches, what must be summed before ZeRO reduces is
summed, then one reduction, one optimizer step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from skipmega.config import RunConfig
from skipmega.data.batches import TokenBatch
from skipmega.kernels.attention import AttentionBackend, document_starts
from skipmega.models.decoder import DecoderStage, StageOutput
from skipmega.models.layer import LayerContext
from skipmega.parallel.grid import ParallelGrid
from skipmega.parallel.mpu import DeepSpeedMpu
from skipmega.parallel.pipeline import attach_loss, run_micro_batches
from skipmega.routing.density import squared_penalty
from skipmega.routing.noise import NoiseKey
from skipmega.training.optimizers import build_optimizer, create_moments


@dataclass
class StepSums:
    """What this process saw in some micro-batches, still on its device and not yet reduced.

    ``loss`` [] float32 sum of nats and ``tokens`` [] float32 their number (last stage; zero elsewhere);
    ``density`` and ``executed`` [num_layers] float32, sums over micro-batches of the share of tokens that
    chose and that ran each of this stage's routed layers; ``micro_batches`` their number.
    """

    loss: Tensor
    tokens: Tensor
    density: Tensor
    executed: Tensor
    micro_batches: int = 0

    @classmethod
    def zeros(cls, num_layers: int, device: torch.device) -> "StepSums":
        """Nothing seen yet."""
        scalar, layers = torch.zeros((), device=device), torch.zeros(num_layers, device=device)
        return cls(loss=scalar, tokens=scalar.clone(), density=layers, executed=layers.clone())

    def add_routing(self, output: StageOutput) -> None:
        """Count one micro-batch's records."""
        self.micro_batches += 1
        if output.records:
            layers = list(output.records)
            self.density[layers] += output.densities().detach()
            executed = torch.stack([record.executed for record in output.records.values()])
            self.executed[layers] += executed.float().mean(dim=(1, 2))


@dataclass(frozen=True)
class Averages:
    """Global means of :class:`StepSums`: ``loss`` in nats per token, shares by global layer number."""

    loss: float
    density: list[float]
    executed: list[float]


class TrainingEngine:
    """A stage, its optimizer and DeepSpeed around them."""

    def __init__(self, config: RunConfig, grid: ParallelGrid) -> None:
        self.config = config
        self.grid = grid
        self.attention: AttentionBackend = (
            "flex" if config.training.compile and grid.device.type == "cuda" else "sdpa"
        )
        stage = DecoderStage(config, grid).to(grid.device)
        self._deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=stage,
            optimizer=build_optimizer(stage, config, grid),
            config=deepspeed_config(config),
            mpu=DeepSpeedMpu(grid),
            dist_init_required=False,
        )
        self.stage: DecoderStage = self._deepspeed.module
        create_moments(self.optimizer, self.stage, grid)
        if config.training.compile:
            self.stage.compile_layers()

    def train_step(self, batches: Iterator[TokenBatch], learning_rate: float, sums: StepSums) -> Tensor:
        """One optimizer step over the next micro-batches; adds what it saw to ``sums``.

        Returns:
            The global gradient norm before clipping, [] float32.
        """
        self.accumulate_gradients(batches, sums)
        return self.apply_gradients(learning_rate)

    def accumulate_gradients(self, batches: Iterator[TokenBatch], sums: StepSums) -> None:
        """Forward and backward of one step's micro-batches, and the reduction over data ranks."""
        self.stage.train()
        micro_batches = self.config.micro_batches
        with self._deepspeed.coalesce_grad_reduction():
            self._run(self._training_step(sums, micro_batches), batches, micro_batches, backward=True)
            self._sum_tied_embedding_gradients()

    def apply_gradients(self, learning_rate: float) -> Tensor:
        """Clip and update; returns the global gradient norm before clipping, [] float32."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._deepspeed.step()
        return torch.as_tensor(self._deepspeed.get_global_grad_norm())

    @torch.no_grad()
    def evaluate(self, batches: Iterator[TokenBatch], micro_batches: int) -> Averages:
        """Held-out loss and densities without noise, at ``routing.eval_capacity_factor``."""
        sums = StepSums.zeros(self.config.model.num_layers, self.grid.device)
        self.stage.eval()
        self._run(self._evaluation_step(sums), batches, micro_batches, backward=False)
        self.stage.train()
        return self.average(sums)

    def average(self, sums: StepSums) -> Averages:
        """Reduce over the grid; every process calls it together and gets the same."""
        layers = self.config.model.num_layers
        packed = torch.cat([sums.loss.view(1), sums.tokens.view(1), sums.density, sums.executed]).clone()
        packed[2:] /= max(sums.micro_batches, 1) * self.grid.data.size
        dist.all_reduce(packed, group=self.grid.data.group)
        dist.all_reduce(packed, group=self.grid.pipeline.group)
        values = packed.tolist()
        return Averages(
            loss=values[0] / max(values[1], 1.0),
            density=values[2 : 2 + layers],
            executed=values[2 + layers :],
        )

    def _run(
        self, step: Callable[..., Any], batches: Iterator[TokenBatch], micro_batches: int, backward: bool
    ) -> None:
        run_micro_batches(
            self.stage,
            batches,
            step,
            num_micro_batches=micro_batches,
            sequence_length=self.config.data.sequence_length,
            micro_batch_size=self.config.training.micro_batch_size,
            backward=backward,
        )

    def _training_step(self, sums: StepSums, micro_batches: int) -> Callable[..., Any]:
        routing, seed = self.config.routing, self.config.training.seed

        def step(batches: Iterator[TokenBatch], stage: DecoderStage) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(batches).to(self.grid.device)
            context = LayerContext(_since(batch), routing.capacity_factor, self.attention)
            output = stage(batch.tokens, context, NoiseKey(seed, batch.sample_ids))
            hidden = output.hidden
            if output.records:
                local = output.densities()
                penalty = squared_penalty(
                    local, self.grid.data.mean(local), routing.density, routing.density_loss_weight
                )
                hidden = attach_loss(hidden, penalty, 1 / micro_batches)
            sums.add_routing(output)
            return self._finish(stage, hidden, batch, sums)

        return step

    def _evaluation_step(self, sums: StepSums) -> Callable[..., Any]:
        factor = self.config.routing.eval_capacity_factor

        def step(batches: Iterator[TokenBatch], stage: DecoderStage) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(batches).to(self.grid.device)
            output = stage(batch.tokens, LayerContext(_since(batch), factor))
            sums.add_routing(output)
            return self._finish(stage, output.hidden, batch, sums)

        return step

    def _finish(
        self, stage: DecoderStage, hidden: Tensor, batch: TokenBatch, sums: StepSums
    ) -> tuple[Tensor, Callable[..., Any]]:
        """The stage's output and, on the last stage, the micro-batch's loss.

        The loss is the sum over unmasked tokens divided by all positions, a constant, so that every token
        of the global batch weighs the same on every grid.
        """
        if not self.grid.is_last_stage:
            return hidden, _no_loss
        masked = stage.losses(hidden, batch.labels) * batch.loss_mask.t()
        sums.loss += masked.detach().sum()
        sums.tokens += batch.loss_mask.sum()
        return masked.sum() / masked.numel(), _loss_and_nothing

    def _sum_tied_embedding_gradients(self) -> None:
        if self.stage.shares_embedding:
            grad = self.stage.embedding.weight.grad
            assert grad is not None
            dist.all_reduce(grad, group=self.grid.embedding)


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's settings; the pipeline schedule owns the micro-batches, so accumulation is one."""
    replicas = config.parallel.data_parallel or 1
    size = config.training.micro_batch_size
    return {
        "train_micro_batch_size_per_gpu": size,
        "train_batch_size": size * replicas,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.gradient_clip,
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.training.precision == "bf16"},
        "steps_per_print": 2**31,
    }


def _since(batch: TokenBatch) -> Tensor | None:
    return None if batch.document_ids is None else document_starts(batch.document_ids)


def _no_loss(output: Tensor) -> tuple[Tensor, None]:
    return output, None


def _loss_and_nothing(loss: Tensor) -> tuple[Tensor, None]:
    return loss, None
