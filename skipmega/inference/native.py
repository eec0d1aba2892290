"""A checkpoint as a language model: tokens in, logits out, on any grid."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from skipmega.checkpoint.store import Checkpoint
from skipmega.config import RunConfig, build_config, resolve_grid
from skipmega.models.decoder import DecoderStage, StageChunk
from skipmega.models.layer import LayerContext
from skipmega.parallel.grid import ParallelGrid
from skipmega.parallel.logical import LogicalTensor, partition_dim
from skipmega.parallel.pipeline import run_micro_batches
from skipmega.routing.state import RoutingState


class NativeModel:
    """A trained decoder, without noise, at ``routing.eval_capacity_factor`` (dropless by default).

    All processes of a replica (tensor x pipeline) call :meth:`logits` together with the same tokens; each
    gets the whole result. Data-parallel replicas are independent.
    """

    def __init__(
        self, config: RunConfig, grid: ParallelGrid, stage: DecoderStage, routing: RoutingState, step: int
    ) -> None:
        self.config = config
        self.grid = grid
        self.stage = stage.eval()
        self._routing = routing
        self._steps_done = step

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        grid: ParallelGrid,
        precision: str = "fp32",
        eval_density: float | None = None,
    ) -> "NativeModel":
        """Read a checkpoint written on any grid.

        Args:
            checkpoint: a complete one.
            grid: the present grid; the checkpoint's own does not matter.
            precision: "fp32" or "bf16", of weights and activations.
            eval_density: share of tokens to execute in each routed layer; None as the checkpoint's
                configuration says.

        Raises:
            ConfigError: the model does not fit the grid, or ``eval_density`` has no meaning for it.
            CheckpointError: the checkpoint cannot be read.
        """
        config = _on_grid(with_eval_density(checkpoint.config, eval_density), grid, precision)
        stage = DecoderStage(config, grid)
        routing = RoutingState(config, stage.routed_layers, torch.device("cpu"))
        weights = {
            f"weights/{name}": LogicalTensor(parameter.data, partition_dim(parameter))
            for name, parameter in stage.named_parameters()
        }
        remembered = {f"routing/{name}": LogicalTensor(t, None) for name, t in routing.tensors().items()}
        checkpoint.read_into(weights | remembered, grid)
        stage = stage.to(grid.device, stage.dtype)
        return cls(config, grid, stage, routing.to(grid.device), checkpoint.state["step"])

    @property
    def max_length(self) -> int:
        """The longest input, in tokens: what the model was trained on."""
        return self.config.data.sequence_length

    @property
    def vocab_size(self) -> int:
        """Width of the logits: the padded vocabulary."""
        return self.config.vocab_size

    @property
    def device(self) -> torch.device:
        """Where :meth:`logits` leaves its result."""
        return self.grid.device

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits at every position; every token sees all earlier ones of its row.

        Args:
            tokens: [b, s] int64.

        Returns:
            [b, s, vocabulary] float32.
        """
        batch, length = tokens.shape
        group = self.config.routing.group_size or 1
        padded = torch.nn.functional.pad(tokens, (0, -length % group)).to(self.device)
        collected = run_micro_batches(
            self.stage.chunks,
            iter([padded]),
            self._step,
            num_micro_batches=1,
            sequence_length=padded.shape[1],
            micro_batch_size=batch,
            backward=False,
            collect_outputs=True,
        )
        if self.grid.is_last_stage:
            result = collected[0].transpose(0, 1).float().contiguous()
        else:
            result = torch.empty(*padded.shape, self.vocab_size, device=self.device)
        return self.grid.broadcast_from_last_stage(result)[:, :length]

    def _step(self, batches: Iterator[Tensor], chunk: StageChunk) -> tuple[Tensor, Callable[..., Any]]:
        tokens = next(batches)
        context = LayerContext(None, self.config.routing.eval_capacity_factor)
        batch, length = tokens.shape
        positions = torch.arange(length, device=tokens.device)
        inputs = self._routing.for_evaluation(self._steps_done, batch, positions)
        hidden = chunk(tokens, context, inputs).hidden
        return (self.stage.logits(hidden) if chunk.is_last else hidden), _output


def with_eval_density(config: RunConfig, eval_density: float | None) -> RunConfig:
    """``config`` with another ``routing.eval_density``; None leaves it as it is.

    Raises:
        ConfigError: it is no density, or has no meaning for the router.
    """
    if eval_density is None:
        return config
    routing = config.routing.model_dump() | {"eval_density": eval_density}
    return build_config(config.model_dump() | {"routing": routing}, source=f"eval_density={eval_density}")


def _output(output: Tensor, non_loss_data: bool) -> Tensor:
    assert non_loss_data
    return output


def _on_grid(config: RunConfig, grid: ParallelGrid, precision: str) -> RunConfig:
    """The checkpoint's configuration with the present grid, whose batch arithmetic plays no role."""
    parallel = config.parallel.model_copy(
        update={
            "tensor_parallel": grid.tensor.size,
            "pipeline_parallel": grid.pipeline.size,
            "data_parallel": grid.data.size,
            "zero_stage": 1,
            "sequence_parallel": False,
            "context_parallel": 1,
            "chunks_per_stage": 1,
            "layers_per_stage": None,
        }
    )
    training = config.training.model_copy(
        update={
            "precision": precision,
            "micro_batch_size": 1,
            "global_batch_size": grid.data.size,
            "eval_sequences": grid.data.size,
        }
    )
    routing = config.routing.model_copy(update={"dispatch": "local"})  # replicas are independent
    changed = {"parallel": parallel, "training": training, "routing": routing}
    return resolve_grid(config.model_copy(update=changed), grid.world_size)
