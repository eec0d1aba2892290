"""Layers whose weights are cut over the tensor axis; the moves before and after them are those of
:class:`skipmega.parallel.sequence.SequenceShards`.

On one tensor-parallel rank each is the plain operation, which compilers see through.
"""

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from skipmega.parallel.grid import Axis, ParallelGrid
from skipmega.parallel.sequence import SequenceShards


def megatron_config(
    *,
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    dtype: torch.dtype,
    grid: ParallelGrid,
    chunks_per_stage: int = 1,
) -> TransformerConfig:
    """What megatron-core's layers and schedules need to know; initialisation of weights is ours.

    The interleaved schedule would silently swap messages between two stages if it sent in batches, and hangs
    if its number of chunks is not that of the stages.
    """
    interleaved = chunks_per_stage > 1
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        tensor_model_parallel_size=grid.tensor.size,
        pipeline_model_parallel_size=grid.pipeline.size,
        context_parallel_size=grid.context.size,
        sequence_parallel=grid.sequence_parallel,
        params_dtype=torch.float32,
        pipeline_dtype=dtype,
        virtual_pipeline_model_parallel_size=chunks_per_stage if interleaved else None,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )


class _CutLinear(nn.Module):
    """``x @ W.T`` with W cut along ``dim`` over the tensor axis."""

    dim: int

    def __init__(self, inputs: int, outputs: int, axis: Axis) -> None:
        super().__init__()
        shape = [outputs, inputs]
        shape[self.dim] //= axis.size
        self.weight = nn.Parameter(torch.empty(shape))
        _mark_as_cut(self.weight, self.dim)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)


class ColumnLinear(_CutLinear):
    """W's rows are cut: [..., in] to this rank's part of the result, [..., out / size].

    The input must come through :meth:`SequenceShards.enter`, once for all projections that share it, so that
    its gradient is summed over the axis once and not per projection.
    """

    dim = 0


class RowLinear(_CutLinear):
    """W's columns are cut: [..., in / size] to this rank's summand of the result, [..., out], which is
    complete after :meth:`SequenceShards.leave`."""

    dim = 1


class VocabularyEmbedding(tensor_parallel.VocabParallelEmbedding):
    """Token embedding with the vocabulary cut over the tensor axis: [b, s] int64 to [s, b, hidden], of which
    each tensor rank gets its rows if ``shards`` cut them over the tensor axis.

    As a tied head it is a :class:`ColumnLinear`: [..., hidden] to [..., vocabulary / size]. Both are calls of
    this module because ZeRO 3 gathers the weights of a module when it is called, and only then.
    """

    def __init__(
        self, vocabulary: int, hidden_size: int, config: TransformerConfig, shards: SequenceShards
    ) -> None:
        super().__init__(
            vocabulary,
            hidden_size,
            init_method=_uninitialised,
            reduce_scatter_embeddings=shards.over_tensor,
            config=config,
            tp_group=shards.tensor.group,
        )
        _mark_as_cut(self.weight, dim=0)

    def forward(self, given: Tensor, as_head: bool = False) -> Tensor:
        if as_head:
            return F.linear(given, self.weight)
        embedded: Tensor = super().forward(given)
        return embedded if self.reduce_scatter_embeddings else embedded.transpose(0, 1).contiguous()


def _uninitialised(weight: Tensor) -> Tensor:
    return weight


def _mark_as_cut(weight: Tensor, dim: int) -> None:
    """megatron-core marks shards only when it initialises them; unmarked ones would be taken for
    replicas: wrong initial weights, and a gradient norm that counts one rank's shard."""
    tensor_parallel.set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def gather_vocabulary(logits: Tensor, axis: Axis) -> Tensor:
    """[..., vocabulary / size] to [..., vocabulary], on every rank of the tensor axis."""
    if axis.size == 1:
        return logits
    return mappings.gather_from_tensor_model_parallel_region(logits, group=axis.group)


def token_losses(logits: Tensor, labels: Tensor, axis: Axis) -> Tensor:
    """Cross-entropy in nats, computed in fp32, never gathering the vocabulary.

    Args:
        logits: [s, b, vocabulary / size], any float dtype.
        labels: [s, b] int64.

    Returns:
        [s, b] float32.
    """
    if axis.size == 1:
        flat = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        return flat.view(labels.shape)
    return tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels.contiguous())
