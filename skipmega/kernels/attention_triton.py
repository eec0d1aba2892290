"""Attention of packed queries by own Triton kernels: an operator with gradients, opaque to compilers.

Imported only where Triton is; :mod:`skipmega.kernels.attention` chooses.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from skipmega.kernels import attention_kernels as kernels

CHUNK = 1024  # positions that a program counts at a time


class Tiles(NamedTuple):
    """Queries and keys that a program takes at a time, and how it is run."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tuning(NamedTuple):
    """The tiles of each kernel."""

    forward: Tiles
    query_gradient: Tiles
    key_gradient: Tiles


# for channels of up to 256 bytes, that is heads of 128 in bf16; and smaller ones that fit in any case
TUNED = Tuning(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 2))
SMALL = Tuning(Tiles(64, 32, 4, 1), Tiles(64, 32, 4, 1), Tiles(32, 64, 4, 1))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    since: Tensor | None,
    tuning: Tuning | None = None,
) -> tuple[Tensor, Tensor]:
    """The forward pass; arguments and result as :func:`skipmega.kernels.attention.packed_attention`'s.

    Returns:
        [q, b, heads, d], and the base-2 logarithm of each row's sum of exponentials, [b, heads, q] float32.
    """
    count, batch, heads, size = query.shape
    tuning = tuning or _tuning(query)
    query, key, value = (_rows(tensor) for tensor in (query, key, value))
    out = torch.empty((count, batch, heads, size), dtype=query.dtype, device=query.device)
    logsum = torch.empty((batch, heads, count), dtype=torch.float32, device=query.device)
    kernels.attention_forward[triton.cdiv(count, tuning.forward.queries), batch * heads](
        query, key, value, positions.contiguous(), _or_none(since), out, logsum, _scale(size), count,
        key.shape[0], batch, heads, heads // key.shape[2], *_strides(query, key, value), D=size,
        DOCUMENTS=since is not None, **_tiled(tuning.forward),
    )  # fmt: skip
    return out, logsum


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    since: Tensor | None,
    out: Tensor,
    logsum: Tensor,
    tuning: Tuning | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; ``out`` and ``logsum`` are those of :func:`attend`."""
    count, batch, heads, size = query.shape
    length, kv_heads = key.shape[0], key.shape[2]
    tuning = tuning or _tuning(query)
    grad, query, key, value = (_rows(tensor) for tensor in (grad, query, key, value))
    positions, since = positions.contiguous(), _or_none(since)
    results = (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        torch.empty(key.shape, dtype=key.dtype, device=key.device),
        torch.empty(value.shape, dtype=value.dtype, device=value.device),
    )
    delta = torch.empty_like(logsum)
    kernels.attention_deltas[triton.cdiv(count, 64), batch * heads](
        out, grad, delta, count, batch, heads, *_strides(grad), D=size, M=64
    )
    sizes = (_scale(size), count, length, batch, heads, heads // kv_heads)
    strides = _strides(query, key, value, grad)
    kernels.attention_query_gradient[triton.cdiv(count, tuning.query_gradient.queries), batch * heads](
        query, key, value, grad, positions, since, logsum, delta, results[0], *sizes, *strides, D=size,
        DOCUMENTS=since is not None, **_tiled(tuning.query_gradient),
    )  # fmt: skip
    kernels.attention_key_gradient[triton.cdiv(length, tuning.key_gradient.keys), batch * kv_heads](
        query, key, value, grad, positions, since, logsum, delta, *results[1:], *sizes, *strides, D=size,
        CHUNK=CHUNK, DOCUMENTS=since is not None, **_tiled(tuning.key_gradient),
    )  # fmt: skip
    return results


def _tuning(query: Tensor) -> Tuning:
    return TUNED if query.shape[-1] * query.element_size() <= 256 else SMALL


def _tiled(tiles: Tiles) -> dict[str, int]:
    return {"M": tiles.queries, "N": tiles.keys, "num_warps": tiles.warps, "num_stages": tiles.stages}


def _rows(tensor: Tensor) -> Tensor:
    """With channels side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [step for tensor in tensors for step in tensor.stride()[:3]]


def _scale(size: int) -> float:
    """What makes base-2 scores of products of heads of ``size`` channels."""
    return 1 / (math.sqrt(size) * math.log(2))


@torch.library.custom_op("skipmega::packed_attention", mutates_args=())
def attention(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, since: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`attend` as an operator that compilers leave alone, with its gradients."""
    return attend(query, key, value, positions, since)


@torch.library.custom_op("skipmega::packed_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, since: Tensor | None,
    out: Tensor, logsum: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return attend_backward(grad, query, key, value, positions, since, out, logsum)


@attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, since: Tensor | None
) -> tuple[Tensor, Tensor]:
    count, batch, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, count), dtype=torch.float32)


@_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, since: Tensor | None,
    out: Tensor, logsum: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_attention_backward(grad, *ctx.saved_tensors), None, None


attention.register_autograd(_backward, setup_context=_keep)
