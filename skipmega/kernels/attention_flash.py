"""Attention of packed queries by FlashAttention-4's kernels: an operator with gradients.

Imported only where the package flash-attn-4 is; :mod:`skipmega.kernels.attention` chooses. Its kernels are
given the blocks to visit and, within blocks that are seen in part, what decides pair by pair. Gradients of
queries are summed with atomic additions in fp32, so repeated runs may differ in their last bits.
"""

from typing import Any

import cutlass
import torch
from cutlass import cute
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
from flash_attn.cute.utils import scalar_to_ssa
from torch import Tensor

from skipmega.kernels.blocks import BLOCK


@cute.jit
def _visible(batch: Any, head: Any, query: Any, key: Any, lengths: Any, bounds: Any) -> Any:
    return key <= scalar_to_ssa(bounds[0][batch[0], query[0]], cutlass.Int32)


@cute.jit
def _visible_of_document(batch: Any, head: Any, query: Any, key: Any, lengths: Any, bounds: Any) -> Any:
    until = scalar_to_ssa(bounds[0][batch[0], query[0]], cutlass.Int32)
    since = scalar_to_ssa(bounds[1][batch[0], query[0]], cutlass.Int32)
    return (key <= until) & (key >= since)


@torch.library.custom_op("skipmega::flash_attention", mutates_args=())
def attention(
    query: Tensor, key: Tensor, value: Tensor, bounds: list[Tensor], lists: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Softmax attention of packed queries, bf16 or fp16.

    Args:
        query: [q, b, heads, d].
        key: [s, b, kv_heads, d]; kv_heads divides heads.
        value: [s, b, kv_heads, d].
        bounds: the last position each query may see, and the first if that is not 0: [b, q] int32, ascending.
        lists: the parts of :class:`skipmega.kernels.blocks.SeenBlocks`, those by block of queries first.

    Returns:
        [q, b, heads, d], and the natural logarithm of each row's sum of exponentials, [b, heads, q] float32.
    """
    out = query.new_empty(query.shape)
    result = _flash_attn_fwd(
        *_batch_first(query, key, value), out=out.transpose(0, 1), return_lse=True, pack_gqa=False,
        **_mask(bounds, lists[:4]),
    )  # fmt: skip
    return out, result[1]


@torch.library.custom_op("skipmega::flash_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bounds: list[Tensor], lists: list[Tensor],
    out: Tensor, logsum: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    dq, dk, dv = _batch_first(*grads)
    _flash_attn_bwd(
        *_batch_first(query, key, value, out, grad), logsum, dq=dq, dk=dk, dv=dv, **_mask(bounds, lists[4:])
    )
    return grads


def _batch_first(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(0, 1) for tensor in tensors]


def _mask(bounds: list[Tensor], lists: list[Tensor]) -> dict[str, Any]:
    """What says who sees whom, in the package's terms; its lists have an axis of heads."""
    one_for_all_heads = [part.contiguous().unsqueeze(1) for part in lists]
    return {
        "mask_mod": _visible if len(bounds) == 1 else _visible_of_document,
        "aux_tensors": [bound.contiguous() for bound in bounds],
        "block_sparse_tensors": BlockSparseTensorsTorch(*one_for_all_heads, block_size=(BLOCK, BLOCK)),
    }


@attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, bounds: list[Tensor], lists: list[Tensor]
) -> tuple[Tensor, Tensor]:
    count, batch, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, count), dtype=torch.float32)


@_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bounds: list[Tensor], lists: list[Tensor],
    out: Tensor, logsum: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bounds, lists = inputs
    ctx.bounds = len(bounds)
    ctx.save_for_backward(query, key, value, *output, *bounds, *lists)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, logsum, *rest = ctx.saved_tensors
    bounds, lists = rest[: ctx.bounds], rest[ctx.bounds :]
    grads = _attention_backward(grad, query, key, value, bounds, lists, out, logsum)
    return *grads, [None] * len(bounds), [None] * len(lists)


attention.register_autograd(_backward, setup_context=_keep)
