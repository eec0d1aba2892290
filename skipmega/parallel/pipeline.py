"""Drives one step's micro-batches through the stages with megatron-core's schedules.

Knows no model: a chunk of a stage is anything that satisfies :class:`PipelineChunk`. megatron-core divides
each micro-batch's loss by their number and multiplies it by that of context-parallel ranks; auxiliary losses
that never reach the last stage are attached to the activations with :func:`attach_loss` and must be divided
by whoever attaches them.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import tee
from typing import Any, Protocol, TypeVar

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import Tensor

Batch = TypeVar("Batch")

ForwardStep = Callable[[Iterator[Batch], Any], tuple[Tensor, Callable[..., Any]]]


class PipelineChunk(Protocol):
    """What megatron-core's schedules ask of a stage, or of each chunk of an interleaved one."""

    config: TransformerConfig
    model_type: ModelType

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Receive the previous chunk's activations, [sequence, micro_batch, hidden]."""


def run_micro_batches(
    chunks: Sequence[PipelineChunk],
    batches: Iterator[Batch],
    forward_step: ForwardStep[Batch],
    *,
    num_micro_batches: int,
    sequence_length: int,
    micro_batch_size: int,
    backward: bool,
    collect_outputs: bool = False,
) -> list[Any]:
    """Run forward (and backward) of one step; gradients stay in ``param.grad``, unreduced over data ranks.

    Args:
        chunks: this process's part of the model (the module itself, never a DeepSpeed engine: driving the
            engine scales gradients twice).
        batches: yields at least ``num_micro_batches`` micro-batches.
        forward_step: maps (batches, chunk) to the chunk's output and a function of the last chunk's output.
            That function returns (loss, data) or, with ``collect_outputs``, is called with
            ``non_loss_data=True`` and returns data alone.
        backward: False runs the forward passes only.
        collect_outputs: the last stage's outputs are wanted, there is no loss.

    Returns:
        On the last stage the data of each micro-batch in order; an empty list on the others.
    """
    schedule = get_forward_backward_func()
    interleaved = len(chunks) > 1
    collected: list[Any] = schedule(
        forward_step_func=forward_step,
        data_iterator=list(tee(batches, len(chunks))) if interleaved else batches,
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=num_micro_batches,
        seq_length=sequence_length,
        micro_batch_size=micro_batch_size,
        forward_only=not backward,
        collect_non_loss_data=collect_outputs,
    )
    return collected


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.loss_dtype = scale, loss.dtype
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full((), ctx.scale, dtype=ctx.loss_dtype, device=grad.device), None


def attach_loss(activation: Tensor, loss: Tensor, scale: float) -> Tensor:
    """``activation`` unchanged; its backward also runs that of ``scale * loss``.

    The way an auxiliary loss of a pipeline stage reaches the gradients although only the last stage has
    a loss to call backward on (the idiom of megatron-core's mixture-of-experts layer).

    Args:
        activation: any tensor on the way to the main loss.
        loss: scalar.
        scale: factor of the loss's gradient, e.g. 1 / micro-batches.
    """
    attached: Tensor = _AttachLoss.apply(activation, loss, scale)
    return attached
