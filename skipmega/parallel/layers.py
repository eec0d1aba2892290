"""megatron-core's tensor-parallel layers with the group passed in and nothing but tensors passed out.

On one tensor-parallel rank each is the plain operation, which compilers see through.
"""

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from skipmega.parallel.grid import Axis, ParallelGrid


def megatron_config(
    *, num_layers: int, hidden_size: int, num_attention_heads: int, dtype: torch.dtype, grid: ParallelGrid
) -> TransformerConfig:
    """What megatron-core's layers and schedules need to know; initialisation of weights is ours."""
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        tensor_model_parallel_size=grid.tensor.size,
        pipeline_model_parallel_size=grid.pipeline.size,
        params_dtype=torch.float32,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )


def _uninitialised(weight: Tensor) -> Tensor:
    return weight


def _mark_as_cut(weight: Tensor, dim: int) -> None:
    """megatron-core marks shards only when it initialises them; unmarked ones would be taken for
    replicas: wrong initial weights, and a gradient norm that counts one rank's shard."""
    tensor_parallel.set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


class ColumnLinear(tensor_parallel.ColumnParallelLinear):
    """``x @ W.T`` with W's rows cut over the tensor axis: [..., in] to [..., out / size].

    The input must come through :func:`enter_tensor_parallel`, once for all projections that share it, so
    that its gradient is summed over the axis once and not per projection.
    """

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig, axis: Axis) -> None:
        super().__init__(
            inputs,
            outputs,
            config=config,
            init_method=_uninitialised,
            bias=False,
            gather_output=False,
            disable_grad_reduce=True,
            tp_group=axis.group,
        )
        _mark_as_cut(self.weight, dim=0)
        self._alone = axis.size == 1

    def forward(self, hidden: Tensor) -> Tensor:
        if self._alone:
            return F.linear(hidden, self.weight)
        return super().forward(hidden)[0]


class RowLinear(tensor_parallel.RowParallelLinear):
    """``x @ W.T`` with W's columns cut over the tensor axis and the result summed over it:
    [..., in / size] to [..., out]."""

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig, axis: Axis) -> None:
        super().__init__(
            inputs,
            outputs,
            config=config,
            init_method=_uninitialised,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=axis.group,
        )
        _mark_as_cut(self.weight, dim=1)
        self._alone = axis.size == 1

    def forward(self, hidden: Tensor) -> Tensor:
        if self._alone:
            return F.linear(hidden, self.weight)
        return super().forward(hidden)[0]


class VocabularyEmbedding(tensor_parallel.VocabParallelEmbedding):
    """Token embedding with the vocabulary cut over the tensor axis: [b, s] int64 to [b, s, hidden]."""

    def __init__(self, vocabulary: int, hidden_size: int, config: TransformerConfig, axis: Axis) -> None:
        super().__init__(
            vocabulary, hidden_size, init_method=_uninitialised, config=config, tp_group=axis.group
        )
        _mark_as_cut(self.weight, dim=0)


def enter_tensor_parallel(hidden: Tensor, axis: Axis) -> Tensor:
    """Identity forward; sums the gradient over the tensor axis backward."""
    if axis.size == 1:
        return hidden
    return mappings.copy_to_tensor_model_parallel_region(hidden, group=axis.group)


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
