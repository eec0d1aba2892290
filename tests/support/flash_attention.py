"""A stand-in for the package flash-attn-4 on machines without a GPU: what its interface says, written out.

It visits the blocks that its lists name and no others, asks the mask for the pairs of partial blocks alone,
and takes the layouts that the kernels take. Of the package it has what our operator uses.
"""

import importlib
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]


@contextmanager
def installed() -> Iterator[None]:
    """Our operator with the stand-in; nobody else finds the package, before or after."""
    names = ["cutlass", "cutlass.cute", "flash_attn", "flash_attn.cute", "flash_attn.cute.block_sparsity",
             "flash_attn.cute.interface", "flash_attn.cute.utils"]  # fmt: skip
    modules = {name: ModuleType(name) for name in names}
    modules["cutlass"].cute = modules["cutlass.cute"]  # type: ignore[attr-defined]
    modules["cutlass"].Int32 = int  # type: ignore[attr-defined]
    modules["cutlass.cute"].jit = lambda function: function  # type: ignore[attr-defined]
    modules["flash_attn.cute.utils"].scalar_to_ssa = lambda scalar, kind: scalar  # type: ignore[attr-defined]
    sparsity, interface = modules["flash_attn.cute.block_sparsity"], modules["flash_attn.cute.interface"]
    sparsity.BlockSparseTensorsTorch = BlockSparseTensorsTorch  # type: ignore[attr-defined]
    interface._flash_attn_fwd, interface._flash_attn_bwd = forward, backward  # type: ignore[attr-defined]
    sys.modules |= modules
    operator = importlib.import_module("skipmega.kernels.attention_flash").__name__
    for name in names:
        del sys.modules[name]
    yield
    del sys.modules[operator]


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, out: Tensor, return_lse: bool, pack_gqa: bool, **mask: Any
) -> tuple[Tensor | None, ...]:
    """q, out [b, q, heads, d]; k, v [b, s, kv_heads, d]."""
    assert return_lse
    assert not pack_gqa
    scores = scores_of(q, k, visited(q, k, by_keys=False, **mask))
    wide_v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    out.copy_(torch.einsum("bhqs,bshd->bqhd", scores.softmax(-1), wide_v))
    return out, scores.logsumexp(-1).float(), None, None, None


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, *,
    dq: Tensor, dk: Tensor, dv: Tensor, **mask: Any,
) -> None:  # fmt: skip
    """From the result and its log-sum-exp, as the kernels."""
    scale, shared = 1 / math.sqrt(q.shape[3]), q.shape[2] // k.shape[2]
    scores = scores_of(q, k, visited(q, k, by_keys=True, **mask))
    weights = (scores - lse.unsqueeze(-1)).exp()
    wide_k, wide_v = (tensor.repeat_interleave(shared, dim=2) for tensor in (k, v))
    inner = torch.einsum("bqhd,bshd->bhqs", dout, wide_v) - (out * dout).sum(-1).transpose(1, 2).unsqueeze(-1)
    slope = weights * inner * scale
    dq.copy_(torch.einsum("bhqs,bshd->bqhd", slope, wide_k))
    for result, factor, rows in ((dk, slope, q), (dv, weights, dout)):
        result.copy_(torch.einsum("bhqs,bqhd->bshd", factor, rows).unflatten(2, (-1, shared)).sum(3))


def scores_of(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    wide_k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bqhd,bshd->bhqs", q, wide_k) / math.sqrt(q.shape[3])
    return scores.masked_fill(~seen.unsqueeze(1), -math.inf)


def visited(
    q: Tensor, k: Tensor, *, by_keys: bool, mask_mod: Any, aux_tensors: list[Tensor],
    block_sparse_tensors: BlockSparseTensorsTorch,
) -> Tensor:  # fmt: skip
    """[b, q, s] bool: pairs of full blocks, and those pairs of partial blocks that the mask lets pass.

    Lists are by block of keys in backward, by block of queries in forward; one for all heads.
    """
    batch, queries, length = len(q), q.shape[1], k.shape[1]
    tall, wide = block_sparse_tensors.block_size
    seen = torch.zeros(batch, queries, length, dtype=torch.bool)
    kinds = (block_sparse_tensors[:2], mask_mod), (block_sparse_tensors[2:4], None)
    for (counts, indices), decide in kinds:
        assert counts.is_contiguous()
        assert indices.is_contiguous()
        for b, _, row in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
            for column in indices[b, 0, row, : int(counts[b, 0, row])].tolist():
                i, j = (column, row) if by_keys else (row, column)
                keys = torch.arange(j * wide, min((j + 1) * wide, length))
                for query in range(i * tall, min((i + 1) * tall, queries)):
                    pairs = torch.ones(len(keys), dtype=torch.bool)
                    if decide is not None:
                        at = torch.tensor([b]), torch.tensor([0]), torch.tensor([query])
                        pairs = decide(*at, keys, None, aux_tensors)
                    assert not seen[b, query, keys].any(), "visited twice"
                    seen[b, query, keys] = pairs
    return seen
