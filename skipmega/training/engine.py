"""One training step: megatron-core's schedule over the stage, then DeepSpeed's optimizer.

The seam (verified against plain torch by the grid-parity tests): the schedule runs on the raw module,
gradients pile up in ``param.grad`` over the micro-batches, what must be summed before data ranks average is
summed, then one reduction, one optimizer step.
"""

from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from torch import Tensor

from skipmega.config import RunConfig
from skipmega.data.order.batches import TokenBatch
from skipmega.errors import ConfigError
from skipmega.kernels.attention import choose_attention, document_starts
from skipmega.models.decoder import DecoderStage, StageChunk
from skipmega.models.layer import LayerContext
from skipmega.parallel.grid import ParallelGrid
from skipmega.parallel.logical import partition_dim
from skipmega.parallel.mpu import DeepSpeedMpu
from skipmega.parallel.pipeline import attach_loss, run_micro_batches
from skipmega.routing.control import DensityController
from skipmega.routing.noise import NoiseKey
from skipmega.routing.state import RoutingState, warmed_up
from skipmega.training.gradients import GradientSums, collect_gradients, sums_in_fp32
from skipmega.training.optimizers import build_optimizer, create_moments
from skipmega.training.sums import Averages, StepSums, average

ForwardStep = Callable[[TokenBatch, StageChunk], tuple[Tensor, Callable[..., Any]]]


class TrainingEngine:
    """A stage, its optimizer and DeepSpeed around them."""

    def __init__(self, config: RunConfig, grid: ParallelGrid) -> None:
        if config.training.cuda_graphs and grid.device.type != "cuda":
            raise ConfigError("training.cuda_graphs=true needs a GPU, and there is none: leave it out")
        self.config = config
        self.grid = grid
        self.attention = choose_attention(
            config.training.attention, grid.device, config.training.compile, config.model.head_size
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
        self._gradients = collect_gradients(self._deepspeed, config, grid)
        create_moments(self.optimizer, self.stage, config, grid)
        self.routing = [RoutingState(config, chunk.routed_layers, grid.device) for chunk in self.stage.chunks]
        self._controllers = [DensityController(state, grid.tokens.mean) for state in self.routing]
        if config.training.compile:
            self.stage.compile_parts()
        if config.training.cuda_graphs:
            assert isinstance(self._gradients, GradientSums)  # ZeRO 3 refuses compiled layers
            self.stage.use_graphs(self._gradients.sums)

    def train_step(
        self, batches: Iterator[TokenBatch], step: int, learning_rate: float, sums: StepSums
    ) -> Tensor:
        """Optimizer step ``step`` (0-based) over the next micro-batches; adds what it saw to ``sums``.

        Returns:
            The global gradient norm before clipping, [] float32.
        """
        self.accumulate_gradients(batches, step, sums)
        return self.apply_gradients(step, learning_rate)

    def accumulate_gradients(self, batches: Iterator[TokenBatch], step: int, sums: StepSums) -> None:
        """Forward and backward of one step's micro-batches, and the reduction over data ranks."""
        if not self.stage.training:
            self.stage.train()
        micro_batches = self.config.micro_batches
        with self._gradients.of_step():
            self._run(
                self._training_step(step, sums, micro_batches), batches, micro_batches, sums, backward=True
            )
            self._sum_gradients_of_cut_tokens()
            self._sum_tied_embedding_gradients()
            sums.keep_router_gradients(self.stage.router_weights())

    def apply_gradients(self, step: int, learning_rate: float) -> Tensor:
        """Clip, update, move the controllers; returns the global norm before clipping, [] float32.

        Gradients that are not finite on any rank are discarded on all of them, and nothing moves
        (:attr:`discarded_update`).
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]
        self._deepspeed.step()
        for controller in self._controllers:
            if self.discarded_update:
                controller.forget_step()
            else:
                controller.end_step(step)
        return torch.as_tensor(self._deepspeed.get_global_grad_norm())

    def discard_gradients(self) -> None:
        """Forget the step's gradients and what its controllers saw, as if it had not been executed."""
        self.optimizer.zero_grad(set_to_none=True)
        averaged = self.optimizer.averaged_gradients
        averaged.update(dict.fromkeys(averaged))
        for controller in self._controllers:
            controller.forget_step()

    @property
    def discarded_update(self) -> bool:
        """Whether the last step's gradients were not finite, which DeepSpeed's ranks agree on."""
        return bool(self.optimizer.overflow)

    def routing_tensors(self) -> dict[str, Tensor]:
        """What routing remembers, the live tensors by logical name (``layers.3.threshold``)."""
        return {name: tensor for state in self.routing for name, tensor in state.tensors().items()}

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterator[TokenBatch],
        micro_batches: int,
        step: int,
        between: Callable[[], None] = lambda: None,
    ) -> Averages:
        """Held-out loss and densities as after ``step`` steps: no router looks ahead, at
        ``routing.eval_capacity_factor`` and ``routing.eval_density``.

        ``between`` is called after every so many micro-batches as a step has; what it raises ends it.
        """
        sums = StepSums.zeros(self.config, self.grid)
        forward = self._evaluation_step(step, sums)
        self.stage.eval()
        for first in range(0, micro_batches, self.config.micro_batches):
            number = min(self.config.micro_batches, micro_batches - first)
            self._run(forward, batches, number, sums, backward=False)
            between()
        self.stage.train()
        return average(sums, self.config, self.grid)

    def release_gathered(self) -> None:
        """Free what ZeRO 3 has gathered of the parameters; their next use gathers anew."""
        self._deepspeed.empty_partition_cache()

    def close(self) -> None:
        """Free the device: DeepSpeed's hooks keep an engine's tensors for as long as the process lives."""
        self.stage.graphs.clear()
        self._deepspeed.destroy()

    def _run(
        self,
        step: ForwardStep,
        batches: Iterator[TokenBatch],
        micro_batches: int,
        sums: StepSums,
        backward: bool,
    ) -> None:
        def forward(source: Iterator[TokenBatch], chunk: StageChunk) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(source).to(self.grid.device)
            with sums.clock.measure():
                return step(batch, chunk)

        running = len(FWD_MODULE_STACK)
        run_micro_batches(
            self.stage.chunks,
            batches,
            forward,
            num_micro_batches=micro_batches,
            sequence_length=self.config.data.sequence_length,
            micro_batch_size=self.config.training.micro_batch_size,
            backward=backward,
        )
        # recomputation stops in the middle of modules, which never leave ZeRO 3's list of those that run
        del FWD_MODULE_STACK[running:]

    def _training_step(self, step: int, sums: StepSums, micro_batches: int) -> ForwardStep:
        routing, seed = self.config.routing, self.config.training.seed
        warmed = warmed_up(self.config, step)

        def forward(batch: TokenBatch, chunk: StageChunk) -> tuple[Tensor, Callable[..., Any]]:
            controller, shards = self._controllers[chunk.number], self.stage.shards
            context = LayerContext(_since(batch), routing.capacity_factor, self.attention, warmed=warmed)
            key = NoiseKey(seed, batch.sample_ids)
            inputs = self.routing[chunk.number].for_training(step, key, self._positions(batch))
            output = chunk(batch.tokens, context, inputs)
            hidden = output.hidden
            if output.records:
                densities = output.densities()
                loss = controller.penalty(densities, step) + output.stacked("auxiliary").sum()
                hidden = attach_loss(hidden, loss, 1 / (micro_batches * shards.summed))
                controller.observe(densities, shards.whole(output.stacked("score"), dim=1))
            sums.add_routing(output.records)
            return self._finish(chunk, hidden, batch, sums)

        return forward

    def _evaluation_step(self, step: int, sums: StepSums) -> ForwardStep:
        factor = self.config.routing.eval_capacity_factor

        def forward(batch: TokenBatch, chunk: StageChunk) -> tuple[Tensor, Callable[..., Any]]:
            sequences, state = batch.tokens.shape[0], self.routing[chunk.number]
            inputs = state.for_evaluation(step, sequences, self._positions(batch))
            output = chunk(batch.tokens, LayerContext(_since(batch), factor), inputs)
            sums.add_routing(output.records)
            return self._finish(chunk, output.hidden, batch, sums)

        return forward

    def _finish(
        self, chunk: StageChunk, hidden: Tensor, batch: TokenBatch, sums: StepSums
    ) -> tuple[Tensor, Callable[..., Any]]:
        """The chunk's output and, of the last chunk, the micro-batch's loss.

        The loss is the sum over unmasked tokens divided by all positions, a constant, so that every token
        of the global batch weighs the same on every grid. Gradients are averaged over context ranks as over
        data ranks; the schedule multiplies by the number of the former, which leaves the positions of all.
        """
        if not chunk.is_last:
            return hidden, _no_loss
        labels = self.stage.shards.take_context(batch.labels, dim=1)
        loss_mask = self.stage.shards.take_context(batch.loss_mask, dim=1)
        masked = self.stage.losses(hidden, labels) * loss_mask.t()
        sums.loss += masked.detach().sum()
        sums.tokens += loss_mask.sum()
        return masked.sum() / batch.labels.numel(), _loss_and_nothing

    def _positions(self, batch: TokenBatch) -> Tensor:
        """[rows of this rank] int64."""
        return self.stage.shards.positions(batch.tokens.shape[1], batch.tokens.device)

    def _sum_gradients_of_cut_tokens(self) -> None:
        """Parameters that every tensor rank has whole (norms, routers) saw only that rank's tokens, if tokens
        are cut over the tensor axis."""
        if not self.grid.sequence_parallel:
            return
        replicated = [p for p in self.stage.parameters() if partition_dim(p) is None]
        gradients = [p.grad for p in replicated if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together, group=self.grid.tensor.group)
        for gradient, summed in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def _sum_tied_embedding_gradients(self) -> None:
        if self.stage.shares_embedding:
            grad = self.stage.embedding.weight.grad
            assert grad is not None
            dist.all_reduce(grad, group=self.grid.embedding)


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's settings; the pipeline schedule owns the micro-batches, so accumulation is one."""
    replicas = (config.parallel.data_parallel or 1) * config.parallel.context_parallel
    size = config.training.micro_batch_size
    # with ZeRO 1 and 2 gradients are no business of DeepSpeed's
    widened = "fp32" if config.parallel.zero_stage == 3 and sums_in_fp32(config) else None
    return {
        "train_micro_batch_size_per_gpu": size,
        "train_batch_size": size * replicas,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.gradient_clip,
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.training.precision == "bf16"},
        "communication_data_type": widened,
        "data_types": {"grad_accum_dtype": widened},
        "steps_per_print": 2**31,
    }


def _since(batch: TokenBatch) -> Tensor | None:
    return None if batch.document_ids is None else document_starts(batch.document_ids)


def _no_loss(output: Tensor) -> tuple[Tensor, None]:
    return output, None


def _loss_and_nothing(loss: Tensor) -> tuple[Tensor, None]:
    return loss, None
